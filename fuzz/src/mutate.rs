//! Small changes of an input, the same for the same seed.
//!
//! Not here: knowing what a change reached; see `harness/`.

use serde_json::Value;

/// splitmix64.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `end`, which is above 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end as u64) as usize
    }

    fn pick<'a, T: ?Sized>(&mut self, list: &[&'a T]) -> &'a T {
        list[self.below(list.len())]
    }
}

/// Text that means something to one reader or another.
const WORDS: [&[u8]; 40] = [
    b"0",
    b"1",
    b"2",
    b"3",
    b"4",
    b"6",
    b"8",
    b"-1",
    b"0.5",
    b"1e999",
    b"1e-400",
    b"18446744073709551615",
    b"18446744073709551616",
    b"9223372036854775807",
    b"4294967296",
    b"null",
    b"true",
    b"false",
    b"[]",
    b"{}",
    b"\"\"",
    b"\"F32\"",
    b"\"BF16\"",
    b"\"F8_E4M3\"",
    b"\"F8_E8M0\"",
    b"\"F4\"",
    b"\"I64\"",
    b"\"U8\"",
    b"\"full\"",
    b"\"low-rank\"",
    b"\"row-patch\"",
    b"\"left-out\"",
    b"\"unchanged\"",
    b"_scale_inv",
    b".weight",
    b"\\u0000",
    b"\\ud800",
    b",",
    b"}",
    b"]",
];

/// An input with a few changes; `other` is one that parts may be taken from.
pub fn mutated(input: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len() + 1);
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(9) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.number() as u8,
            2 => bytes.insert(at, random.number() as u8),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let copy = bytes[at..end].to_vec();
                let place = random.below(bytes.len() + 1);
                bytes.splice(place..place, copy);
            }
            5 if !other.is_empty() => {
                let from = random.below(other.len());
                let to = (from + 1 + random.below(64)).min(other.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
            6 => drop(bytes.splice(at..at, random.pick(&WORDS).iter().copied())),
            // Mostly numbers and names stand between such bytes.
            _ => {
                let edge = |byte: &u8| b"[]{},:\" \n".contains(byte);
                let start = bytes[..at].iter().rposition(edge).map_or(0, |found| found + 1);
                let stop = bytes[at..].iter().position(edge).map_or(bytes.len(), |found| at + found);
                let word = random.pick(&WORDS);
                bytes.splice(start..stop.max(start), word.iter().copied());
            }
        }
    }
    bytes
}

/// A safetensors file whose length prefix is that of its JSON again, and whose data are as long as the header says if
/// that is not much. Without this nearly every change is refused for its length alone.
pub fn repaired_header(mut bytes: Vec<u8>) -> Vec<u8> {
    let Some(end) = bytes.iter().rposition(|&byte| byte == b'}') else { return bytes };
    let Some(header_bytes) = (end + 1).checked_sub(8) else { return bytes };
    bytes[..8].copy_from_slice(&(header_bytes as u64).to_le_bytes());
    if let Ok(Value::Object(entries)) = serde_json::from_slice(&bytes[8..=end]) {
        let ends = entries.values().filter_map(|entry| entry["data_offsets"].get(1)?.as_u64());
        if let Some(data_bytes) = ends.max().filter(|&bytes| bytes <= 4096) {
            bytes.resize(end + 1 + data_bytes as usize, 0);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutated_is_the_same_for_the_same_seed() {
        let run = || {
            let mut random = Random(7);
            (0..50).map(|_| mutated(b"{\"a\": [1, 2]}", b"[3]", &mut random)).collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
        assert!(run().iter().any(|bytes| bytes != b"{\"a\": [1, 2]}"));
    }

    #[test]
    fn repaired_header_has_the_length_of_its_json_and_of_its_data() {
        let json = br#"{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#;
        let bytes = repaired_header([&[9; 8], &json[..], &[1; 20]].concat());
        assert_eq!(bytes.len(), 8 + json.len() + 3);
        assert_eq!(bytes[..8], (json.len() as u64).to_le_bytes());
        assert_eq!(repaired_header(b"{}".to_vec()), b"{}");
    }
}
