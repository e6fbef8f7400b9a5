//! Data sets of the Hugging Face hub, through the cache that all programs of it share.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use glob::{MatchOptions, Pattern};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{FormatKind, detect};
use crate::error::{DataError, Result, one_line};
use crate::temporary;

const PREFIX: &str = "hf://datasets/";
/// Files that describe a data set, and are none of it.
const DESCRIPTIONS: &[&str] = &["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"];

/// Where data sets of the Hugging Face hub are found, and where they are kept.
///
/// A data set is named by a path of [`Sources`](crate::Sources):
///
/// ```text
/// hf://datasets/OWNER/NAME                         every file of a known format, but for .md files
/// hf://datasets/OWNER/NAME/FOLDER                  those in a folder
/// hf://datasets/OWNER/NAME/data/train-*.parquet    those that fit a pattern, or one file
/// hf://datasets/OWNER/NAME@REVISION/...            of a branch, a tag or a commit; otherwise of main
/// hf://datasets/OWNER/NAME@refs/convert/parquet    the Parquet files that the hub makes of every data set
/// ```
///
/// Files are downloaded once, into the cache that Python's `huggingface_hub` uses too, and a download that was cut
/// off is gone on with. What a download of a large file gives is checked against the hub's SHA-256. Which files there
/// are is asked anew by each program; without a network, or offline, it is what the hub said last.
///
/// The default reads the environment: `HF_ENDPOINT`, `HF_TOKEN` (or the token of `hf auth login`), `HF_HUB_CACHE`
/// (or `HF_HOME`), `HF_HUB_OFFLINE`.
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    cache: Option<PathBuf>,
    token: Option<String>,
    offline: bool,
    retries: u32,
}

impl Default for Hub {
    fn default() -> Self {
        Self::from_variables(|name| std::env::var(name).ok(), std::env::home_dir())
    }
}

impl Hub {
    fn from_variables(variable: impl Fn(&str) -> Option<String>, home: Option<PathBuf>) -> Self {
        let set = |name: &str| {
            variable(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| Some(home?.join(".cache/huggingface")));
        let offline = set("HF_HUB_OFFLINE")
            .is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        Self {
            endpoint: set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
            cache: set("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home?.join("hub"))),
            token: set("HF_TOKEN"),
            offline,
            retries: 4,
        }
    }

    /// Sets the address of the hub.
    pub fn with_endpoint(self, endpoint: impl Into<String>) -> Self {
        Self { endpoint: endpoint.into(), ..self }
    }

    /// Sets the folder that downloads are kept in.
    pub fn with_cache(self, folder: impl Into<PathBuf>) -> Self {
        Self { cache: Some(folder.into()), ..self }
    }

    /// Sets the token of an account, for data sets that ask for a permission.
    pub fn with_token(self, token: impl Into<String>) -> Self {
        Self { token: Some(token.into()), ..self }
    }

    /// Sets whether the network is left alone.
    pub fn with_offline(self, offline: bool) -> Self {
        Self { offline, ..self }
    }

    /// Sets how often a download that was cut off is gone on with at once: 4 times by default.
    pub fn with_retries(self, retries: u32) -> Self {
        Self { retries, ..self }
    }

    /// The local files of a data set, after downloading those that are not there yet.
    fn files(&self, name: &str, format: Option<FormatKind>) -> Result<Vec<PathBuf>> {
        let data_set = DataSet::parse(name)?;
        let cache = self
            .cache
            .as_ref()
            .ok_or_else(|| data_set.failed("there is no folder to keep it in: set HF_HOME to one"))?;
        let local = Local { folder: cache.join(data_set.repo(&data_set.revision).folder_name()) };
        let listing = self.listing(&data_set, &local)?;
        let files = data_set.select(&listing.files, format)?;
        let snapshot = local.folder.join("snapshots").join(&listing.sha);
        files.into_iter().map(|file| self.file(&data_set, &listing.sha, &snapshot, file)).collect()
    }

    /// Which files there are.
    fn listing(&self, data_set: &DataSet, local: &Local) -> Result<Listing> {
        let last = || local.listing(&data_set.revision);
        if self.offline {
            return last().ok_or_else(|| {
                let folder = local.folder.display();
                data_set.failed(format!("HF_HUB_OFFLINE is set, and it was never downloaded to {folder}"))
            });
        }
        let repo = self.api(data_set)?.repo(data_set.repo(&data_set.revision));
        let listing = match repo.info() {
            Ok(info) => {
                let files = info.siblings.into_iter().map(|file| file.rfilename).collect();
                Listing { sha: info.sha, files }
            }
            Err(error) => {
                if is_network(&error)
                    && let Some(listing) = last()
                {
                    return Ok(listing);
                }
                return Err(self.failed(data_set, &error));
            }
        };
        // These names become paths.
        if let Some(name) = std::iter::once(&listing.sha).chain(&listing.files).find(|name| !is_inside(name))
        {
            return Err(data_set.failed(format!("the hub names a file {name:?}")));
        }
        local
            .save(&data_set.revision, &listing)
            .map_err(|error| DataError::io("write", &local.folder, error))?;
        Ok(listing)
    }

    /// One file, downloaded if it is not there.
    fn file(&self, data_set: &DataSet, sha: &str, snapshot: &Path, file: &str) -> Result<PathBuf> {
        let path = snapshot.join(file);
        if path.exists() {
            return Ok(path);
        }
        if self.offline {
            return Err(data_set.failed(format!("HF_HUB_OFFLINE is set, and {file} was never downloaded")));
        }
        // Of the commit that was listed, even if the branch has gone on meanwhile.
        let repo = self.api(data_set)?.repo(data_set.repo(sha));
        let mut tries = 0;
        let path = loop {
            match repo.download(file) {
                Ok(path) => break path,
                Err(error) if is_network(&error) && tries < self.retries => {
                    std::thread::sleep(Duration::from_millis(100 << tries.min(6)));
                    tries += 1;
                }
                Err(error) => return Err(self.failed(data_set, &error)),
            }
        };
        check(&path).map_err(|problem| data_set.failed(format!("{file}: {problem}")))?;
        Ok(path)
    }

    fn api(&self, data_set: &DataSet) -> Result<Api> {
        let cache = Cache::new(self.cache.clone().unwrap_or_default());
        let token = self.token.clone().or_else(|| cache.token());
        ApiBuilder::from_cache(cache)
            .with_endpoint(self.endpoint.clone())
            .with_token(token)
            .with_progress(false)
            .build()
            .map_err(|error| data_set.failed(one_line(error)))
    }

    /// What an error of the hub means.
    fn failed(&self, data_set: &DataSet, error: &ApiError) -> DataError {
        match status(error) {
            Some(status @ (401 | 403)) => DataError::HubPermission {
                dataset: data_set.name.clone(),
                status,
                url: format!("{}/datasets/{}", self.endpoint, data_set.name),
                tokens: format!("{}/settings/tokens", self.endpoint),
            },
            Some(404) => {
                let revision = &data_set.revision;
                data_set.failed(format!("there is no such data set, or it has no revision {revision}"))
            }
            Some(status) => data_set.failed(format!("{} answers with status {status}", self.endpoint)),
            None => data_set.failed(one_line(error)),
        }
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token is a secret.
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .field("retries", &self.retries)
            .finish()
    }
}

/// A hub, and what was found on it: all clones of some sources read the same files.
#[derive(Clone, Debug, Default)]
pub(super) struct Shared(Arc<(Hub, Mutex<Found>)>);

/// The files of each data set, of one format or of any.
type Found = HashMap<(String, Option<FormatKind>), Vec<PathBuf>>;

impl From<Hub> for Shared {
    fn from(hub: Hub) -> Self {
        Self(Arc::new((hub, Mutex::default())))
    }
}

impl Shared {
    pub(super) fn files(&self, name: &str, format: Option<FormatKind>) -> Result<Vec<PathBuf>> {
        let (hub, found) = &*self.0;
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (name.to_owned(), format);
        if let Some(files) = found.get(&key) {
            return Ok(files.clone());
        }
        let files = hub.files(name, format)?;
        found.insert(key, files.clone());
        Ok(files)
    }
}

/// A data set as it is named.
#[derive(Debug, PartialEq, Eq)]
struct DataSet {
    /// Owner and name.
    name: String,
    revision: String,
    /// A file, a folder or a pattern within it.
    path: Option<String>,
}

impl DataSet {
    fn parse(text: &str) -> Result<Self> {
        let refuse = || DataError::Config {
            name: "a data set of the hub",
            got: text.to_owned(),
            expected: "hf://datasets/OWNER/NAME, with @REVISION and /PATH behind it where wanted",
        };
        let rest = text.strip_prefix(PREFIX).ok_or_else(refuse)?;
        let (owner, rest) = rest.split_once('/').ok_or_else(refuse)?;
        let end = rest.find(['@', '/']).unwrap_or(rest.len());
        let (name, mut rest) = rest.split_at(end);
        let mut revision = "main".to_owned();
        if let Some(named) = rest.strip_prefix('@') {
            // The hub's own branches have slashes in their names.
            let slashes = if named.starts_with("refs/") { 2 } else { 0 };
            let end = named.match_indices('/').map(|(at, _)| at).nth(slashes).unwrap_or(named.len());
            let (before, after) = named.split_at(end);
            revision = before.replace("%2F", "/");
            rest = after;
        }
        let path = rest.trim_matches('/');
        let plain = |name: &str| !name.is_empty() && !name.contains(['@', ':', '\\']) && is_inside(name);
        if !plain(owner) || !plain(name) || !is_inside(&revision) {
            return Err(refuse());
        }
        let path = (!path.is_empty()).then(|| path.to_owned());
        Ok(Self { name: format!("{owner}/{name}"), revision, path })
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.name.clone(), RepoType::Dataset, revision.to_owned())
    }

    fn failed(&self, problem: impl Into<String>) -> DataError {
        DataError::Hub { dataset: self.name.clone(), problem: problem.into() }
    }

    /// The files that are meant, in the order of their names.
    fn select<'a>(&self, files: &'a [String], format: Option<FormatKind>) -> Result<Vec<&'a str>> {
        let options = MatchOptions {
            require_literal_leading_dot: true,
            require_literal_separator: true,
            ..MatchOptions::new()
        };
        let is_data = |file: &str| {
            let path = Path::new(file);
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let text = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("md"));
            let hidden = file.split('/').any(|part| part.starts_with('.'));
            detect::is_data(path, format) && !text && !hidden && !DESCRIPTIONS.contains(&name)
        };
        let all = || files.iter().map(String::as_str);
        let mut selected: Vec<&str> = match &self.path {
            None => all().filter(|file| is_data(file)).collect(),
            Some(path) if path.contains(['*', '?', '[']) => {
                let pattern = Pattern::new(path).map_err(|error| self.failed(one_line(error)))?;
                all().filter(|file| pattern.matches_with(file, options)).collect()
            }
            Some(path) => {
                let within =
                    |file: &str| file.strip_prefix(path.as_str()).is_some_and(|rest| rest.starts_with('/'));
                all().filter(|file| file == path || (within(file) && is_data(file))).collect()
            }
        };
        selected.sort_unstable();
        if selected.is_empty() {
            let shown: Vec<&str> = all().take(8).collect();
            let wanted =
                self.path.as_ref().map_or("a known format".to_owned(), |path| format!("the path {path}"));
            return Err(self.failed(format!("it has no file of {wanted} (it has: {})", shown.join(", "))));
        }
        Ok(selected)
    }
}

/// Which files a commit of a data set has.
#[derive(Debug, Serialize, Deserialize)]
struct Listing {
    sha: String,
    files: Vec<String>,
}

/// The folder of a data set in the cache.
struct Local {
    folder: PathBuf,
}

impl Local {
    fn listing_path(&self, revision: &str) -> PathBuf {
        self.folder.join(format!("vesper-{}.json", revision.replace('/', "--")))
    }

    /// What the hub said last; or, where only other programs used it, what they downloaded.
    fn listing(&self, revision: &str) -> Option<Listing> {
        let saved = std::fs::read(self.listing_path(revision)).ok();
        if let Some(listing) = saved.and_then(|bytes| serde_json::from_slice::<Listing>(&bytes).ok()) {
            return Some(listing);
        }
        let reference = std::fs::read_to_string(self.folder.join("refs").join(revision)).ok();
        let sha = reference.map_or_else(|| revision.to_owned(), |sha| sha.trim().to_owned());
        let snapshot = self.folder.join("snapshots").join(&sha);
        let mut files = Vec::new();
        walk(&snapshot, "", &mut files).ok()?;
        (!files.is_empty()).then_some(Listing { sha, files })
    }

    fn save(&self, revision: &str, listing: &Listing) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let mut file = temporary::file(&self.folder)?;
        file.write_all(&serde_json::to_vec(listing)?)?;
        file.persist(self.listing_path(revision))?;
        Ok(())
    }
}

/// Adds the files below `folder`, with slashes in their names, and `prefix` before them.
fn walk(folder: &Path, prefix: &str, files: &mut Vec<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        // A snapshot has links to files, and no links to folders.
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), &format!("{name}/"), files)?;
        } else {
            files.push(name);
        }
    }
    Ok(())
}

/// Whether a name from outside is a path that leads further down only.
fn is_inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Checks a file that was just downloaded: large ones are stored under their SHA-256.
fn check(path: &Path) -> Result<(), String> {
    let blob = path.canonicalize().map_err(|error| error.to_string())?;
    let name = blob.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if name.len() != 64 || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(());
    }
    let mut digest = Sha256::new();
    std::fs::File::open(&blob)
        .and_then(|mut file| std::io::copy(&mut file, &mut digest))
        .map_err(|error| error.to_string())?;
    let found = digest.finalize().iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    if found == name.to_ascii_lowercase() {
        return Ok(());
    }
    // So that it is downloaded again, instead of being used.
    for damaged in [path, &blob] {
        std::fs::remove_file(damaged).ok();
    }
    Err(format!("what was downloaded has the SHA-256 {found}, not {name} as the hub says: try again"))
}

/// The HTTP status that an error is about.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

/// Whether it may go well at another time: the hub was not reached, or was cut off.
fn is_network(error: &ApiError) -> bool {
    match error {
        ApiError::RequestError(_) => status(error).is_none_or(|status| status == 429 || status >= 500),
        ApiError::IoError(_) => true,
        ApiError::TooManyRetries(error) => is_network(error),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_data_sets_are_taken_apart() {
        let parsed = |text: &str| {
            let DataSet { name, revision, path } = DataSet::parse(text).unwrap();
            (name, revision, path.unwrap_or_default())
        };
        let expect =
            |name: &str, revision: &str, path: &str| (name.to_owned(), revision.to_owned(), path.to_owned());
        assert_eq!(parsed("hf://datasets/o/n"), expect("o/n", "main", ""));
        assert_eq!(parsed("hf://datasets/o/n/"), expect("o/n", "main", ""));
        assert_eq!(parsed("hf://datasets/o/n@v1.0/a/*.txt"), expect("o/n", "v1.0", "a/*.txt"));
        assert_eq!(
            parsed("hf://datasets/o/n@refs/convert/parquet/default/train"),
            expect("o/n", "refs/convert/parquet", "default/train")
        );
        assert_eq!(parsed("hf://datasets/o/n@refs%2Fpr%2F1"), expect("o/n", "refs/pr/1", ""));
        for text in [
            "hf://o/n",
            "hf://datasets/n",
            "hf://datasets//n",
            "hf://datasets/o/",
            "hf://datasets/../n",
            "hf://datasets/o/n@",
            "hf://datasets/o/n@refs/../..",
        ] {
            assert!(DataSet::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn files_are_selected_by_format_folder_and_pattern() {
        let files = [
            "README.md",
            ".gitattributes",
            "dataset_infos.json",
            "data/b.parquet",
            "data/a.parquet",
            "extra/c.jsonl.gz",
            "extra/note.md",
            "photo.jpg",
            ".cache/x.txt",
        ]
        .map(str::to_owned);
        let select = |path: &str, format| {
            let data_set = DataSet::parse(&format!("hf://datasets/o/n/{path}")).unwrap();
            data_set.select(&files, format).map(|files| files.join(" ")).map_err(|error| error.to_string())
        };
        assert_eq!(select("", None).unwrap(), "data/a.parquet data/b.parquet extra/c.jsonl.gz");
        assert_eq!(select("", Some(FormatKind::Jsonl)).unwrap(), "extra/c.jsonl.gz");
        assert_eq!(select("data", None).unwrap(), "data/a.parquet data/b.parquet");
        assert_eq!(select("*/[bc].*", None).unwrap(), "data/b.parquet extra/c.jsonl.gz");
        assert_eq!(select("README.md", None).unwrap(), "README.md");
        let error = select("dat", None).unwrap_err();
        assert!(
            error.contains("it has no file of the path dat (it has: README.md, .gitattributes, "),
            "{error}"
        );
    }

    #[test]
    fn the_environment_is_respected() {
        let hub = |pairs: &[(&str, &str)]| {
            let find =
                |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            Hub::from_variables(find, Some("/home/me".into()))
        };
        let default = hub(&[("HF_TOKEN", " ")]);
        assert_eq!(default.endpoint, "https://huggingface.co");
        assert_eq!(default.cache, Some(PathBuf::from("/home/me/.cache/huggingface/hub")));
        assert!(default.token.is_none() && !default.offline);
        let set = hub(&[
            ("HF_HOME", "/hf"),
            ("HF_TOKEN", "secret\n"),
            ("HF_HUB_OFFLINE", "True"),
            ("HF_ENDPOINT", "http://x"),
        ]);
        assert_eq!(set.cache, Some(PathBuf::from("/hf/hub")));
        assert_eq!(
            (set.endpoint.as_str(), set.token.as_deref(), set.offline),
            ("http://x", Some("secret"), true)
        );
        assert!(!format!("{set:?}").contains("secret"));
        assert_eq!(hub(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/hf")]).cache, Some(PathBuf::from("/c")));
        assert!(!hub(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn names_that_lead_elsewhere_are_not_followed() {
        for name in ["a", "a/b.txt", "v1..2"] {
            assert!(is_inside(name), "{name}");
        }
        for name in ["", "/a", "../a", "a/../../b", ".."] {
            assert!(!is_inside(name), "{name}");
        }
    }
}
