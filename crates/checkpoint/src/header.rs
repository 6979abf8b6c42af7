//! Bytes of a safetensors header -> what they promise.
//!
//! `u64` little-endian length, JSON object, data. The length is at most 100,000,000 and inside the file; names are
//! unique; every range is exactly the size of its dtype and shape; the ranges tile the data without gap or overlap and
//! end where the file ends. What is accepted here is accepted by the `safetensors` crate too (tests/it/oracle.rs); the
//! reverse does not hold: unknown keys in an entry, a name given twice and leading spaces are refused.
//!
//! Not here: opening files, which is `shards`.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::dtype::Dtype;
use crate::error::{CheckpointError, HeaderError, Result, printable};

/// Longest header that is read, the format's own limit.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

/// One tensor as its header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderEntry {
    /// Tensor name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sides, empty for a scalar.
    pub shape: Vec<u64>,
    /// First byte, counted from the end of the header.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

/// A header whose promises were checked against the file's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// `__metadata__`, empty if absent.
    pub metadata: BTreeMap<String, String>,
    /// Tensors in the order of their bytes.
    pub entries: Vec<HeaderEntry>,
    /// Where the data starts in the file: 8 and the header's length.
    pub data_offset: u64,
}

/// Reads the header from `bytes`, the beginning of a file of `file_bytes` bytes in all.
///
/// `bytes` may be longer than the header; if it is shorter than the header claims, that is an error.
pub fn parse_header(bytes: &[u8], file_bytes: u64) -> Result<Header, HeaderError> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(HeaderError::TooShort { file_bytes });
    };
    let header_bytes = checked_length(*length, file_bytes)?;
    let json = usize::try_from(header_bytes)
        .ok()
        .and_then(|length| rest.get(..length))
        .ok_or(HeaderError::PastEnd { header_bytes, file_bytes })?;
    let data_offset = 8 + header_bytes;
    parse_json(json, data_offset, file_bytes - data_offset)
}

/// Reads and checks the header of an open file; at most the header is read.
pub(crate) fn read_header(file: &File, path: &Path) -> Result<Header> {
    let refuse = |source| CheckpointError::Header { file: path.to_path_buf(), source };
    let file_bytes = file.metadata().map_err(CheckpointError::io("read", path))?.len();
    if file_bytes < 8 {
        return Err(refuse(HeaderError::TooShort { file_bytes }));
    }
    let mut length = [0u8; 8];
    file.read_exact_at(&mut length, 0).map_err(CheckpointError::io("read", path))?;
    let header_bytes = checked_length(length, file_bytes).map_err(refuse)?;
    // At most HEADER_BYTES_MAX and inside the file, so the allocation is bounded by both.
    let mut json = vec![0u8; header_bytes as usize];
    file.read_exact_at(&mut json, 8).map_err(CheckpointError::io("read", path))?;
    let data_offset = 8 + header_bytes;
    parse_json(&json, data_offset, file_bytes - data_offset).map_err(refuse)
}

fn checked_length(length: [u8; 8], file_bytes: u64) -> Result<u64, HeaderError> {
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(HeaderError::TooLong { header_bytes, limit_bytes: HEADER_BYTES_MAX });
    }
    if 8 + header_bytes > file_bytes {
        return Err(HeaderError::PastEnd { header_bytes, file_bytes });
    }
    Ok(header_bytes)
}

fn parse_json(json: &[u8], data_offset: u64, data_bytes: u64) -> Result<Header, HeaderError> {
    if json.first() != Some(&b'{') {
        return Err(HeaderError::Json { detail: "it does not start with `{`".into() });
    }
    let raw: RawHeader = serde_json::from_slice(json)
        .map_err(|error| HeaderError::Json { detail: printable(&error.to_string()) })?;

    let mut names = HashSet::with_capacity(raw.entries.len());
    for (name, _) in &raw.entries {
        if !names.insert(name.as_str()) {
            return Err(HeaderError::DuplicateName { tensor: name.clone() });
        }
    }
    drop(names);

    let mut entries = raw.entries.into_iter().map(checked_entry).collect::<Result<Vec<_>, _>>()?;
    entries.sort_by(|a, b| (a.start, a.end, &a.name).cmp(&(b.start, b.end, &b.name)));
    let mut expected = 0;
    for entry in &entries {
        let (tensor, start) = (entry.name.clone(), entry.start);
        match start.cmp(&expected) {
            std::cmp::Ordering::Less => return Err(HeaderError::Overlap { tensor, start, expected }),
            std::cmp::Ordering::Greater => return Err(HeaderError::Gap { tensor, start, expected }),
            std::cmp::Ordering::Equal => expected = entry.end,
        }
    }
    if expected != data_bytes {
        return Err(HeaderError::DataLength { need_bytes: expected, data_bytes });
    }
    Ok(Header { metadata: raw.metadata, entries, data_offset })
}

fn checked_entry((name, raw): (String, RawEntry)) -> Result<HeaderEntry, HeaderError> {
    let Some(dtype) = Dtype::from_name(&raw.dtype) else {
        return Err(HeaderError::UnknownDtype { tensor: name, dtype: raw.dtype });
    };
    let [start, end] = raw.data_offsets;
    if end < start {
        return Err(HeaderError::RangeReversed { tensor: name, start, end });
    }
    let Some(need_bytes) = dtype.bytes_of(&raw.shape) else {
        return Err(HeaderError::ShapeOverflow { tensor: name, shape: shape_text(&raw.shape), dtype });
    };
    let range_bytes = end - start;
    if need_bytes != range_bytes {
        return Err(HeaderError::SizeMismatch { tensor: name, need_bytes, range_bytes });
    }
    Ok(HeaderEntry { name, dtype, shape: raw.shape, start, end })
}

fn shape_text(shape: &[u64]) -> String {
    if shape.len() <= 8 { format!("{shape:?}") } else { format!("of {} sides", shape.len()) }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The object with every key as written, so that a name given twice is seen.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    entries: Vec<(String, RawEntry)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut metadata = None;
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key != "__metadata__" {
                        entries.push((key, map.next_value()?));
                    } else if metadata.replace(map.next_value()?).is_some() {
                        return Err(de::Error::custom("`__metadata__` occurs twice"));
                    }
                }
                Ok(RawHeader { metadata: metadata.unwrap_or_default(), entries })
            }
        }

        deserializer.deserialize_map(Keys)
    }
}
