//! Data sets of the hub, from a server on this machine.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use vesper_data::source::Hub;
use vesper_data::{DataError, Result, Sources};

use crate::hex;

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does, and was asked.
#[derive(Default)]
struct State {
    files: Vec<(String, Vec<u8>)>,
    /// The token without which it refuses.
    token: Option<String>,
    /// How many more answers are cut off after half of the bytes.
    cuts: usize,
    /// Whether the checksums it gives are wrong.
    lies: bool,
    /// Path and range of each request.
    requests: Vec<(String, String)>,
}

/// A server with the answers of the hub. It ends with the test's process.
struct Server {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    fn start(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away is its own business.
                answer(stream, &shared).ok();
            }
        });
        Self { address, state }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn requests(&self) -> Vec<(String, String)> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    fn sources(&self, cache: &Path, name: &str, change: impl FnOnce(Hub) -> Hub) -> Sources {
        let hub = Hub::default()
            .with_endpoint(&self.address)
            .with_cache(cache.join("hub"))
            .with_token("none")
            .with_offline(false)
            .with_retries(0);
        Sources::new([name]).with_hub(change(hub))
    }

    fn read(&self, cache: &Path, name: &str) -> Result<Vec<String>> {
        texts(&self.sources(cache, name, |hub| hub))
    }
}

fn texts(sources: &Sources) -> Result<Vec<String>> {
    sources.documents()?.map(|document| Ok(document?.text)).collect()
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut token) = (String::new(), String::new());
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => value.clone_into(&mut range),
            "authorization" => value.clone_into(&mut token),
            _ => {}
        }
    }
    let mut state = state.lock().unwrap();
    state.requests.push((path.clone(), range.clone()));
    if state.token.as_ref().is_some_and(|wanted| token != format!("Bearer {wanted}")) {
        return respond(&mut stream, "403 Forbidden", "", b"");
    }
    if path == "/api/datasets/o/n/revision/main" {
        let names: Vec<String> =
            state.files.iter().map(|(name, _)| format!("{{\"rfilename\": {name:?}}}")).collect();
        let body = format!("{{\"sha\": \"{SHA}\", \"siblings\": [{}]}}", names.join(", "));
        return respond(&mut stream, "200 OK", "content-type: application/json\r\n", body.as_bytes());
    }
    let file = path.strip_prefix(&format!("/datasets/o/n/resolve/{SHA}/")).map(str::to_owned);
    let found = state.files.iter().find(|(name, _)| Some(name) == file.as_ref()).cloned();
    let Some((_, bytes)) = found else { return respond(&mut stream, "404 Not Found", "", b"") };
    let (start, end) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |end: usize| end + 1);
    let mut etag = hex(&Sha256::digest(&bytes));
    if state.lies {
        etag = etag.replace(['0', '1', '2', '3'], "4");
    }
    let total = bytes.len();
    let headers = format!(
        "etag: \"{etag}\"\r\nx-repo-commit: {SHA}\r\ncontent-range: bytes {start}-{}/{total}\r\n",
        end - 1
    );
    let body = &bytes[start..end];
    if state.cuts > 0 && body.len() > 1 {
        state.cuts -= 1;
        let head = format!("HTTP/1.1 206 Partial Content\r\n{headers}content-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes())?;
        return stream.write_all(&body[..body.len() / 2]);
    }
    respond(&mut stream, "206 Partial Content", &headers, body)
}

fn respond(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    // Until the client has read everything.
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read(&mut [0]).map(|_| ())
}

const FILES: &[(&str, &[u8])] =
    &[("README.md", b"# About"), ("data/b.jsonl", b"{\"text\": \"deux\"}\n"), ("data/a.txt", b"un")];

#[test]
fn a_data_set_is_downloaded_once_and_read_like_a_folder() {
    let (server, cache) = (Server::start(FILES), tempfile::tempdir().unwrap());
    let sources = server.sources(cache.path(), "hf://datasets/o/n", |hub| hub);
    assert_eq!(texts(&sources).unwrap(), ["un", "deux"]);
    assert!(!server.requests().is_empty());
    // The same sources ask no more.
    assert_eq!(sources.files().unwrap().len(), 2);
    sources.settings_digest().unwrap();
    assert!(server.requests().is_empty());
    // Others ask which files there are, and download none.
    assert_eq!(server.read(cache.path(), "hf://datasets/o/n/data/*.jsonl").unwrap(), ["deux"]);
    let requests = server.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert_eq!(server.read(cache.path(), "hf://datasets/o/n/README.md").unwrap(), ["# About"]);
}

#[test]
fn what_is_in_the_cache_is_read_without_a_network() {
    let (server, cache) = (Server::start(FILES), tempfile::tempdir().unwrap());
    server.read(cache.path(), "hf://datasets/o/n/data/a.txt").unwrap();
    server.requests();
    let offline = |name: &str| texts(&server.sources(cache.path(), name, |hub| hub.with_offline(true)));
    assert_eq!(offline("hf://datasets/o/n/data/a.txt").unwrap(), ["un"]);
    let error = offline("hf://datasets/o/n").unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot read o/n from the Hugging Face hub: HF_HUB_OFFLINE is set, and data/b.jsonl was never downloaded"
    );
    let error = offline("hf://datasets/o/other").unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE is set, and it was never downloaded to "), "{error}");
    assert!(server.requests().is_empty());
    // A hub that cannot be reached: nothing listens on that port any more.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = |name: &str| {
        texts(&server.sources(cache.path(), name, |hub| hub.with_endpoint(format!("http://{address}"))))
    };
    assert_eq!(unreachable("hf://datasets/o/n/data/a.txt").unwrap(), ["un"]);
    assert!(matches!(unreachable("hf://datasets/o/other"), Err(DataError::Hub { .. })));
}

#[test]
fn a_cache_that_another_program_filled_is_read_offline() {
    let (server, cache) = (Server::start(&[]), tempfile::tempdir().unwrap());
    let folder = cache.path().join("hub/datasets--o--n");
    std::fs::create_dir_all(folder.join("refs")).unwrap();
    std::fs::write(folder.join("refs/main"), SHA).unwrap();
    let snapshot = folder.join("snapshots").join(SHA);
    std::fs::create_dir_all(snapshot.join("data")).unwrap();
    std::fs::write(snapshot.join("data/a.txt"), "un").unwrap();
    let read = |name: &str| texts(&server.sources(cache.path(), name, |hub| hub.with_offline(true)));
    assert_eq!(read("hf://datasets/o/n").unwrap(), ["un"]);
    assert_eq!(read(&format!("hf://datasets/o/n@{SHA}/data")).unwrap(), ["un"]);
}

#[test]
fn a_data_set_that_asks_for_a_permission_says_what_to_do() {
    let (server, cache) = (Server::start(FILES), tempfile::tempdir().unwrap());
    server.set(|state| state.token = Some("mine".to_owned()));
    let error = server.read(cache.path(), "hf://datasets/o/n").unwrap_err();
    let address = &server.address;
    assert_eq!(
        error.to_string(),
        format!(
            "the hub refuses the data set o/n (status 403): log in, open {address}/datasets/o/n, and accept its \
             conditions where it has some; then give a token of that account (from {address}/settings/tokens) in the \
             variable HF_TOKEN, or by \"hf auth login\""
        )
    );
    let sources = server.sources(cache.path(), "hf://datasets/o/n", |hub| hub.with_token("mine"));
    assert_eq!(texts(&sources).unwrap(), ["un", "deux"]);
}

#[test]
fn a_download_that_was_cut_off_goes_on_where_it_was() {
    let (server, cache) =
        (Server::start(&[("a.txt", &b"0123456789".repeat(1000))]), tempfile::tempdir().unwrap());
    server.set(|state| state.cuts = 1);
    let error = server.read(cache.path(), "hf://datasets/o/n").unwrap_err();
    assert!(matches!(error, DataError::Hub { .. }), "{error}");
    server.requests();
    assert_eq!(server.read(cache.path(), "hf://datasets/o/n").unwrap(), ["0123456789".repeat(1000)]);
    let ranges: Vec<String> = server.requests().into_iter().map(|(_, range)| range).collect();
    assert_eq!(ranges, ["", "bytes=0-0", "bytes=5000-"]);
}

#[test]
fn a_download_that_is_cut_off_is_tried_again() {
    let (server, cache) =
        (Server::start(&[("a.txt", &b"0123456789".repeat(1000))]), tempfile::tempdir().unwrap());
    server.set(|state| state.cuts = 2);
    let sources = server.sources(cache.path(), "hf://datasets/o/n", |hub| hub.with_retries(2));
    assert_eq!(texts(&sources).unwrap(), ["0123456789".repeat(1000)]);
}

#[cfg(unix)]
#[test]
fn a_download_with_another_checksum_is_refused_and_not_kept() {
    let (server, cache) = (Server::start(FILES), tempfile::tempdir().unwrap());
    server.set(|state| state.lies = true);
    let name = "hf://datasets/o/n/data/a.txt";
    let error = server.read(cache.path(), name).unwrap_err().to_string();
    assert!(error.contains("data/a.txt: what was downloaded has the SHA-256 "), "{error}");
    server.set(|state| state.lies = false);
    assert_eq!(server.read(cache.path(), name).unwrap(), ["un"]);
}

#[test]
fn what_the_hub_does_not_have_is_named() {
    let (server, cache) = (Server::start(FILES), tempfile::tempdir().unwrap());
    let message = |name: &str| server.read(cache.path(), name).unwrap_err().to_string();
    assert_eq!(
        message("hf://datasets/o/other"),
        "cannot read o/other from the Hugging Face hub: there is no such data set, or it has no revision main"
    );
    assert_eq!(
        message("hf://datasets/o/n/x"),
        "cannot read o/n from the Hugging Face hub: it has no file of the path x (it has: README.md, data/b.jsonl, data/a.txt)"
    );
    assert!(message("hf://datasets/o").contains("expected hf://datasets/OWNER/NAME"));
}

#[test]
fn a_hub_that_names_files_elsewhere_is_not_believed() {
    let (server, cache) = (Server::start(&[("../../a.txt", b"x")]), tempfile::tempdir().unwrap());
    let error = server.read(cache.path(), "hf://datasets/o/n").unwrap_err().to_string();
    assert!(error.ends_with("the hub names a file \"../../a.txt\""), "{error}");
}
