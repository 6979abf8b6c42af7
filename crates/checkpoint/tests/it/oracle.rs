//! The `safetensors` crate as oracle: what it writes we read alike, and what we accept it accepts.

use std::collections::BTreeMap;

use checkpoint::{
    Dtype, ShardSet, TensorSpec, aligned_order, default_metadata, parse_header, safetensors_bytes,
};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorView};

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![
        Dtype::F32,
        Dtype::F16,
        Dtype::Bf16,
        Dtype::F64,
        Dtype::U8,
        Dtype::I64,
        Dtype::F8E4M3,
    ])
}

type Parts = Vec<(TensorSpec, Vec<u8>)>;

/// Up to six tensors with unlike names, sides of 0 to 4 and arbitrary bytes.
fn tensors() -> impl Strategy<Value = Parts> {
    let one = (dtypes(), prop::collection::vec(0u64..5, 0..4), any::<u64>());
    prop::collection::btree_map("[a-z.\u{1}-\u{1f}\"é]{1,12}", one, 0..6).prop_map(|map| {
        let build = |(name, (dtype, shape, seed)): (String, (Dtype, Vec<u64>, u64))| {
            let bytes = dtype.bytes_of(&shape).unwrap();
            let data = (0..bytes).map(|n| (seed.wrapping_mul(n + 1) >> 13) as u8).collect();
            ((name, dtype, shape), data)
        };
        map.into_iter().map(build).collect()
    })
}

fn oracle_dtype(dtype: Dtype) -> safetensors::Dtype {
    serde_json::from_value(dtype.name().into()).unwrap()
}

fn oracle_bytes(tensors: &Parts) -> Vec<u8> {
    let views = tensors.iter().map(|((name, dtype, shape), data)| {
        let sides = shape.iter().map(|&side| side as usize).collect();
        (name.clone(), TensorView::new(oracle_dtype(*dtype), sides, data).unwrap())
    });
    safetensors::serialize(views, Some(default_metadata().into_iter().collect())).unwrap()
}

/// What the oracle sees, in our words.
fn oracle_view(metadata: &Metadata) -> BTreeMap<String, (String, Vec<u64>, u64, u64)> {
    metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let dtype = serde_json::to_value(info.dtype).unwrap().as_str().unwrap().to_owned();
            let shape = info.shape.iter().map(|&side| side as u64).collect();
            (name, (dtype, shape, info.data_offsets.0 as u64, info.data_offsets.1 as u64))
        })
        .collect()
}

/// Ours, or nothing if refused; whatever is accepted must be what the oracle sees.
fn compare(bytes: &[u8]) -> Result<bool, TestCaseError> {
    let Ok(header) = parse_header(bytes, bytes.len() as u64) else { return Ok(false) };
    let (length, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| TestCaseError::fail(format!("we accept what the oracle refuses: {error}")))?;
    prop_assert_eq!(header.data_offset, 8 + length as u64);
    let ours: BTreeMap<_, _> = header
        .entries
        .into_iter()
        .map(|entry| (entry.name, (entry.dtype.name().to_owned(), entry.shape, entry.start, entry.end)))
        .collect();
    prop_assert_eq!(ours, oracle_view(&metadata));
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_of_the_oracle_are_read_alike(tensors in tensors()) {
        prop_assert!(compare(&oracle_bytes(&tensors))?, "a valid file was refused");
    }

    #[test]
    fn files_of_ours_are_read_by_the_oracle(tensors in tensors()) {
        let bytes = safetensors_bytes(&default_metadata(), &tensors).unwrap();
        prop_assert!(compare(&bytes)?, "our own file was refused");
        let read = SafeTensors::deserialize(&bytes).unwrap();
        for ((name, ..), data) in &tensors {
            prop_assert_eq!(read.tensor(name).unwrap().data(), &data[..]);
        }
        prop_assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
    }

    #[test]
    fn aligned_order_makes_the_oracles_bytes(tensors in tensors()) {
        let mut order: Vec<_> = tensors.iter().map(|((name, dtype, shape), data)| (name.clone(), *dtype, (shape, data))).collect();
        aligned_order(&mut order);
        // The oracle breaks ties of width by its own dtype order; compare where there are none.
        let mixed = order.windows(2).any(|pair| pair[0].1 != pair[1].1 && pair[0].1.bits() == pair[1].1.bits());
        let ours: Parts = order.into_iter().map(|(name, dtype, (shape, data))| ((name, dtype, shape.clone()), data.clone())).collect();
        if !mixed {
            prop_assert_eq!(safetensors_bytes(&default_metadata(), &ours).unwrap(), oracle_bytes(&tensors));
        }
    }

    #[test]
    fn mutated_files_are_accepted_only_with_the_oracle(
        tensors in tensors(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), edit()), 1..5),
    ) {
        let mut bytes = oracle_bytes(&tensors);
        for (place, edit) in edits {
            if bytes.is_empty() {
                break;
            }
            // Most edits hit the header, where the rules are.
            let header_end = bytes.len().min(8 + 300);
            let at = place.index(header_end);
            match edit {
                Edit::Set(byte) => bytes[at] = byte,
                Edit::Insert(text) => { bytes.splice(at..at, text.bytes()); }
                Edit::Remove => { bytes.remove(at); }
                Edit::Truncate => bytes.truncate(at),
                Edit::Grow => bytes.push(0),
            }
            compare(&bytes)?;
            // With the length put right again the JSON itself is reached.
            if let Some(json) = bytes.get(8..).and_then(|rest| rest.iter().rposition(|&b| b == b'}').map(|end| end + 1)) {
                let mut mended = bytes.clone();
                mended[..8].copy_from_slice(&(json as u64).to_le_bytes());
                compare(&mended)?;
            }
        }
    }

    #[test]
    fn arbitrary_headers_never_panic(text in "[{}\\[\\]\":,0-9a-zA-Z_ \\\\-]{0,200}", data in 0usize..20) {
        compare(&crate::support::raw_file(&text, data))?;
        compare(&crate::support::raw_file(&format!("{{\"a\":{text}"), data))?;
    }

    #[test]
    fn written_then_read_is_byte_exact(tensors in tensors()) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.safetensors"), safetensors_bytes(&default_metadata(), &tensors).unwrap()).unwrap();
        let set = ShardSet::open(dir.path()).unwrap();
        prop_assert_eq!(set.tensors().len(), tensors.len());
        for ((name, dtype, shape), data) in &tensors {
            let info = set.get(name).unwrap();
            prop_assert_eq!((info.dtype, &info.shape), (*dtype, shape));
            prop_assert_eq!(&set.read(info).unwrap(), data);
        }
    }
}

#[derive(Clone, Debug)]
enum Edit {
    Set(u8),
    Insert(&'static str),
    Remove,
    Truncate,
    Grow,
}

fn edit() -> impl Strategy<Value = Edit> {
    let pieces =
        ["0", "9", ",", "\"", "{}", "[1]", "null", " ", "\\u0000", "1e9", "-", "\"x\":1,", "F32", "\u{e9}"];
    prop_oneof![
        4 => any::<u8>().prop_map(Edit::Set),
        4 => (b'0'..=b'9').prop_map(Edit::Set),
        3 => prop::sample::select(pieces.to_vec()).prop_map(Edit::Insert),
        2 => Just(Edit::Remove),
        1 => Just(Edit::Truncate),
        1 => Just(Edit::Grow),
    ]
}

#[test]
fn every_dtype_has_the_oracles_name_and_width() {
    for &dtype in Dtype::ALL {
        assert_eq!(oracle_dtype(dtype).bitsize() as u64, dtype.bits(), "{dtype}");
    }
}
