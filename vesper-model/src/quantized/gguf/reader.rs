//! Reading the parts of a header, none of which is believed to be longer than the file.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::invalid;
use crate::hf::io;
use crate::{ModelError, Result};

/// The longest name of a key or a tensor.
const LONGEST_NAME: u64 = 65_535;
/// How deep arrays may stand in arrays.
const DEEPEST: usize = 4;

/// A value of the metadata. Arrays are checked and passed over: nothing here needs them.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array,
}

impl Value {
    /// What it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "an integer",
            Self::Float(_) => "a number",
            Self::Bool(_) => "a boolean",
            Self::Text(_) => "a text",
            Self::Array => "an array",
        }
    }
}

/// A file, where the reading of it stands, and how long it is.
pub(super) struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    at: u64,
    len: u64,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io(path))?;
        let about = file.metadata().map_err(io(path))?;
        if about.is_dir() {
            return Err(invalid(path, "a folder, expected a GGUF file"));
        }
        Ok(Self { path: path.into(), file: BufReader::new(file), at: 0, len: about.len() })
    }

    pub(super) fn at(&self) -> u64 {
        self.at
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn remaining(&self) -> u64 {
        self.len - self.at
    }

    pub(super) fn invalid(&self, reason: impl AsRef<str>) -> ModelError {
        invalid(&self.path, reason)
    }

    /// That the file goes on for `n` bytes.
    fn expect(&self, n: u64, what: &str) -> Result<()> {
        if n <= self.remaining() {
            return Ok(());
        }
        Err(self.invalid(format!(
            "truncated: {} bytes, but {what} takes {n} bytes from byte {} on",
            self.len, self.at
        )))
    }

    fn exactly<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.expect(N as u64, what)?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes).map_err(io(&self.path))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn skip(&mut self, n: u64, what: &str) -> Result<()> {
        self.expect(n, what)?;
        // `expect` has compared it with the length of a file.
        self.file.seek_relative(n as i64).map_err(io(&self.path))?;
        self.at += n;
        Ok(())
    }

    pub(super) fn magic(&mut self) -> Result<[u8; 4]> {
        self.exactly("how a GGUF file begins")
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.exactly(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.exactly(what)?))
    }

    /// A text of any length that the file has.
    fn text(&mut self, what: &str) -> Result<String> {
        let n = self.u64(what)?;
        self.expect(n, what)?;
        let mut bytes = vec![0; n as usize];
        self.file.read_exact(&mut bytes).map_err(io(&self.path))?;
        self.at += n;
        String::from_utf8(bytes).map_err(|_| self.invalid(format!("{what} is not UTF-8 text")))
    }

    /// The name of a key or a tensor.
    pub(super) fn name(&mut self, what: &str) -> Result<String> {
        let at = self.at;
        let n = self.u64(what)?;
        if n == 0 || n > LONGEST_NAME {
            return Err(self.invalid(format!(
                "{what}, at byte {at}, is {n} bytes long, expected from 1 to {LONGEST_NAME}"
            )));
        }
        self.at -= 8;
        self.file.seek_relative(-8).map_err(io(&self.path))?;
        self.text(what)
    }

    pub(super) fn value(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32(key)?;
        self.value_of(kind, key)
    }

    fn value_of(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.exactly::<1>(key)?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.exactly(key)?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.exactly(key)?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.exactly(key)?))),
            4 => Value::Unsigned(u64::from(self.u32(key)?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.exactly(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.exactly(key)?))),
            7 => match self.exactly::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.invalid(format!("{key} is the boolean {other}, expected 0 or 1"))),
            },
            8 => Value::Text(self.text(key)?),
            9 => {
                self.skip_array(key, 1)?;
                Value::Array
            }
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.exactly(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.exactly(key)?)),
            other => {
                return Err(self.invalid(format!("{key} is of type {other}, expected a type from 0 to 12")));
            }
        })
    }

    fn skip_array(&mut self, key: &str, depth: usize) -> Result<()> {
        let kind = self.u32(key)?;
        let n = self.u64(key)?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 | 9 => {
                if depth > DEEPEST {
                    return Err(self.invalid(format!("{key} has arrays in arrays more than {DEEPEST} deep")));
                }
                // Each element has a length of its own, so a count that is too large meets the end of the file.
                self.expect(n.saturating_mul(8), key)?;
                for _ in 0..n {
                    if kind == 8 {
                        let length = self.u64(key)?;
                        self.skip(length, key)?;
                    } else {
                        self.skip_array(key, depth + 1)?;
                    }
                }
                return Ok(());
            }
            other => {
                return Err(self.invalid(format!("{key} has elements of type {other}, expected 0 to 12")));
            }
        };
        self.skip(n.saturating_mul(size), key)
    }
}
