//! One named test per hostile header, each with the error it has to be.

use checkpoint::{CheckpointError, HEADER_BYTES_MAX, HeaderError, ShardSet, parse_header};

use crate::support::raw_file;

/// Parses a whole file in memory and, to the same verdict, from disk.
#[track_caller]
fn refuse(bytes: &[u8]) -> HeaderError {
    let error = parse_header(bytes, bytes.len() as u64).unwrap_err();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    match ShardSet::open(dir.path()) {
        Err(CheckpointError::Header { file, source }) => {
            assert_eq!(source, error);
            assert!(file.ends_with("model.safetensors"));
        }
        other => panic!("{other:?}"),
    }
    error
}

fn f32_entry(name: &str, sides: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"F32","shape":[{sides}],"data_offsets":[{start},{end}]}}"#)
}

#[test]
fn valid_header_with_metadata_scalar_and_empty() {
    let header = format!(
        "{{\"__metadata__\":{{\"format\":\"pt\"}},{},{},{}}}  ",
        f32_entry("matrix", "2,3", 4, 28),
        f32_entry("scalar", "", 0, 4),
        f32_entry("empty", "0,7", 4, 4)
    );
    let bytes = raw_file(&header, 28);
    let parsed = parse_header(&bytes, bytes.len() as u64).unwrap();
    let order: Vec<_> = parsed.entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(order, ["scalar", "empty", "matrix"]);
    assert_eq!(parsed.data_offset, 8 + header.len() as u64);
    assert_eq!(parsed.metadata["format"], "pt");
}

#[test]
fn file_shorter_than_a_length() {
    assert_eq!(refuse(&[1, 2, 3]), HeaderError::TooShort { file_bytes: 3 });
    assert_eq!(refuse(&[]), HeaderError::TooShort { file_bytes: 0 });
}

#[test]
fn header_length_beyond_the_file() {
    let mut bytes = raw_file("{}", 0);
    bytes[0] = 200;
    assert_eq!(refuse(&bytes), HeaderError::PastEnd { header_bytes: 200, file_bytes: 10 });
}

#[test]
fn header_over_100_megabytes() {
    for length in [HEADER_BYTES_MAX + 1, u64::MAX, u64::MAX - 7, 1 << 63] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        assert_eq!(
            refuse(&bytes),
            HeaderError::TooLong { header_bytes: length, limit_bytes: HEADER_BYTES_MAX }
        );
    }
}

#[test]
fn file_truncated_in_its_data() {
    let bytes = raw_file(&format!("{{{}}}", f32_entry("w", "4", 0, 16)), 12);
    assert_eq!(refuse(&bytes), HeaderError::DataLength { need_bytes: 16, data_bytes: 12 });
}

#[test]
fn file_with_bytes_after_the_last_tensor() {
    let bytes = raw_file(&format!("{{{}}}", f32_entry("w", "4", 0, 16)), 17);
    assert_eq!(refuse(&bytes), HeaderError::DataLength { need_bytes: 16, data_bytes: 17 });
}

#[test]
fn ranges_that_overlap() {
    let bytes = raw_file(&format!("{{{},{}}}", f32_entry("a", "2", 0, 8), f32_entry("b", "2", 4, 12)), 12);
    assert_eq!(refuse(&bytes), HeaderError::Overlap { tensor: "b".into(), start: 4, expected: 8 });
}

#[test]
fn ranges_that_leave_a_gap() {
    let bytes = raw_file(&format!("{{{},{}}}", f32_entry("a", "1", 0, 4), f32_entry("b", "1", 8, 12)), 12);
    assert_eq!(refuse(&bytes), HeaderError::Gap { tensor: "b".into(), start: 8, expected: 4 });
    let bytes = raw_file(&format!("{{{}}}", f32_entry("a", "1", 4, 8)), 8);
    assert_eq!(refuse(&bytes), HeaderError::Gap { tensor: "a".into(), start: 4, expected: 0 });
}

#[test]
fn range_that_ends_before_it_starts() {
    let bytes = raw_file(&format!("{{{}}}", f32_entry("a", "1", 8, 4)), 8);
    assert_eq!(refuse(&bytes), HeaderError::RangeReversed { tensor: "a".into(), start: 8, end: 4 });
}

#[test]
fn shape_whose_product_overflows() {
    for sides in ["4294967296,4294967296", "18446744073709551615,2", "9223372036854775808"] {
        let bytes = raw_file(&format!("{{{}}}", f32_entry("a", sides, 0, 4)), 4);
        assert!(
            matches!(refuse(&bytes), HeaderError::ShapeOverflow { tensor, .. } if tensor == "a"),
            "{sides}"
        );
    }
}

#[test]
fn shape_that_lies() {
    let bytes = raw_file(&format!("{{{}}}", f32_entry("a", "3", 0, 16)), 16);
    assert_eq!(
        refuse(&bytes),
        HeaderError::SizeMismatch { tensor: "a".into(), need_bytes: 12, range_bytes: 16 }
    );
}

#[test]
fn half_byte_elements_that_do_not_fill_a_byte() {
    let bytes = raw_file(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2);
    assert!(matches!(refuse(&bytes), HeaderError::ShapeOverflow { .. }));
}

#[test]
fn name_given_twice() {
    let bytes = raw_file(&format!("{{{},{}}}", f32_entry("a", "1", 0, 4), f32_entry("a", "1", 4, 8)), 8);
    assert_eq!(refuse(&bytes), HeaderError::DuplicateName { tensor: "a".into() });
    // The same name spelt with an escape is the same name.
    let bytes =
        raw_file(&format!("{{{},{}}}", f32_entry("a", "1", 0, 4), f32_entry("\\u0061", "1", 4, 8)), 8);
    assert_eq!(refuse(&bytes), HeaderError::DuplicateName { tensor: "a".into() });
}

#[test]
fn dtype_unknown() {
    let bytes = raw_file(r#"{"a":{"dtype":"F128","shape":[1],"data_offsets":[0,16]}}"#, 16);
    assert_eq!(refuse(&bytes), HeaderError::UnknownDtype { tensor: "a".into(), dtype: "F128".into() });
}

#[test]
fn header_that_is_no_object_of_tensors() {
    for header in [
        "",
        "[]",
        "null",
        " {}",
        "{",
        "{}x",
        r#"{"a":1}"#,
        r#"{"a":{}}"#,
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551616]}}"#,
        r#"{"__metadata__":{"format":1}}"#,
        r#"{"__metadata__":"pt"}"#,
        r#"{"__metadata__":{},"__metadata__":{}}"#,
    ] {
        assert!(matches!(refuse(&raw_file(header, 0)), HeaderError::Json { .. }), "{header}");
    }
    let mut not_utf8 = raw_file("{}  ", 0);
    not_utf8[10] = 0xff;
    assert!(matches!(refuse(&not_utf8), HeaderError::Json { .. }));
}

#[test]
fn header_nested_without_end() {
    let header = format!("{{\"a\":{}", "[".repeat(100_000));
    assert!(matches!(refuse(&raw_file(&header, 0)), HeaderError::Json { .. }));
}

#[test]
fn control_characters_in_names_are_escaped_in_messages() {
    let bytes = raw_file(&format!("{{{}}}", f32_entry("\\u001b[31mred\\n", "3", 0, 16)), 16);
    let message = refuse(&bytes).to_string();
    assert!(message.contains("\\u{1b}[31mred\\u{a}"), "{message}");
    assert!(!message.chars().any(char::is_control), "{message}");
    // Text that only the JSON reader sees goes through the same gate.
    let bytes = raw_file(r#"{"a":{"dty\u001bpe":1}}"#, 0);
    assert!(!refuse(&bytes).to_string().chars().any(char::is_control));
}
