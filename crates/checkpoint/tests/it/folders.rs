//! Folders as they are downloaded, and as they are not supposed to be.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use checkpoint::{
    Checkpoint, CheckpointError, Dtype, ShardSet, content_line, default_metadata, safetensors_bytes,
};
use serde_json::json;
use tempfile::tempdir;

use crate::support::*;

const SHARD_1: &str = "model-00001-of-00002.safetensors";
const SHARD_2: &str = "model-00002-of-00002.safetensors";
const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn one_file_and_two_shards_are_the_same_model() {
    let dir = tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    save_model(&one);
    save_sharded_model(&two);
    let (one, two) = (Checkpoint::open(&one, None).unwrap(), Checkpoint::open(&two, None).unwrap());
    assert_eq!(one.shards().files().len(), 1);
    assert_eq!(two.shards().files().len(), 2);
    let names = |model: &Checkpoint| model.tensors().iter().map(|info| info.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&one), names(&two));
    assert_eq!(names(&one).len(), 4);
    for name in names(&one) {
        assert_eq!(one.read_base(&name).unwrap().1, two.read_base(&name).unwrap().1, "{name}");
    }
    assert_eq!(one.content().unwrap(), two.content().unwrap());
    assert_eq!(one.config().layers, 1);
}

#[test]
fn content_of_a_known_model_is_stable() {
    let dir = tempdir().unwrap();
    save(dir.path(), "model.safetensors", &[tensor("w", Dtype::F32, &[2, 1], &[1.0, -2.0])]);
    save_config(dir.path());
    let mut hash = xxhash_line(&[1.0f32, -2.0]);
    hash.insert_str(0, "w F32 [2,1] ");
    hash.push('\n');
    let want = format!("blake3:{}", blake3::hash(hash.as_bytes()).to_hex());
    assert_eq!(Checkpoint::open(dir.path(), None).unwrap().content().unwrap(), want);
}

fn xxhash_line(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes))
}

#[test]
fn content_from_digests_is_the_content() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    let open = || Checkpoint::open(dir.path(), None).unwrap();
    let want = open().content().unwrap();
    let all: BTreeMap<String, u128> = model_tensors()
        .into_iter()
        .map(|((name, ..), bytes)| (name, xxhash_rust::xxh3::xxh3_128(&bytes)))
        .collect();
    assert_eq!(open().content_from(&all).unwrap(), want);
    let some = all.iter().take(2).map(|(name, digest)| (name.clone(), *digest)).collect();
    assert_eq!(open().content_from(&some).unwrap(), want);
    let lines = open().tensors().iter().map(|info| content_line(info, all[&info.name])).collect();
    assert_eq!(checkpoint::content_of(lines), want);

    // Digests are believed, so the weights were not read; and what was found once stays.
    let wrong = all.keys().map(|name| (name.clone(), 0)).collect();
    let model = open();
    let believed = model.content_from(&wrong).unwrap();
    assert_ne!(believed, want);
    assert_eq!(model.content().unwrap(), believed);

    let foreign = BTreeMap::from([("model.ghost.weight".to_owned(), 0)]);
    assert!(matches!(open().content_from(&foreign), Err(CheckpointError::UnknownTensor { .. })));
}

#[test]
fn content_changes_with_a_value_a_shape_a_dtype_and_a_name() {
    let base = tensor("w", Dtype::F32, &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let mut seen = std::collections::HashSet::new();
    for tensors in [
        vec![base.clone()],
        vec![tensor("w", Dtype::F32, &[2, 2], &[1.0, 2.0, 3.0, 5.0])],
        vec![tensor("w", Dtype::F32, &[4], &[1.0, 2.0, 3.0, 4.0])],
        vec![(("w".into(), Dtype::I32, vec![2, 2]), base.1.clone())],
        vec![tensor("v", Dtype::F32, &[2, 2], &[1.0, 2.0, 3.0, 4.0])],
    ] {
        let dir = tempdir().unwrap();
        save(dir.path(), "model.safetensors", &tensors);
        save_config(dir.path());
        assert!(seen.insert(Checkpoint::open(dir.path(), None).unwrap().content().unwrap()));
    }
}

#[test]
fn shard_that_is_missing() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    fs::remove_file(dir.path().join(SHARD_2)).unwrap();
    match ShardSet::open(dir.path()) {
        Err(CheckpointError::MissingShard { shard, .. }) => assert!(shard.ends_with(SHARD_2)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn index_that_names_an_absent_tensor() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    edit_index(dir.path(), |map| {
        map.insert("model.ghost.weight".into(), json!(SHARD_1));
    });
    match ShardSet::open(dir.path()) {
        Err(CheckpointError::AbsentTensor { tensor, file }) => {
            assert_eq!(tensor, "model.ghost.weight");
            assert!(file.ends_with(SHARD_1));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn tensor_in_a_shard_but_not_in_the_index() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    edit_index(dir.path(), |map| {
        map.remove(Q_PROJ);
    });
    match ShardSet::open(dir.path()) {
        Err(CheckpointError::UnindexedTensor { tensor, file }) => {
            assert_eq!(tensor, Q_PROJ);
            assert!(file.ends_with(SHARD_2));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn tensor_that_the_index_places_in_another_shard() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    edit_index(dir.path(), |map| {
        map.insert(Q_PROJ.into(), json!(SHARD_1));
    });
    assert!(
        matches!(ShardSet::open(dir.path()), Err(CheckpointError::DuplicateTensor { tensor, .. }) if tensor == Q_PROJ)
    );
}

#[test]
fn tensor_in_two_shards() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    save(dir.path(), SHARD_1, &model_tensors());
    assert!(matches!(ShardSet::open(dir.path()), Err(CheckpointError::DuplicateTensor { .. })));
}

#[test]
fn name_twice_in_the_index() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    let map = format!(r#"{{"weight_map":{{"a":"{SHARD_1}","a":"{SHARD_2}"}}}}"#);
    fs::write(dir.path().join("model.safetensors.index.json"), map).unwrap();
    assert!(
        matches!(ShardSet::open(dir.path()), Err(CheckpointError::DuplicateTensor { tensor, .. }) if tensor == "a")
    );
}

#[test]
fn index_without_tensors_or_without_a_map() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    for index in [r#"{"weight_map":{}}"#, "{}", "[]", r#"{"weight_map":{"a":1}}"#, "not json"] {
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        assert!(matches!(ShardSet::open(dir.path()), Err(CheckpointError::Json { .. })), "{index}");
    }
}

#[test]
fn shard_paths_that_are_absolute_or_climb() {
    let outer = tempdir().unwrap();
    let dir = outer.path().join("model");
    save_sharded_model(&dir);
    let absolute = dir.join(SHARD_2).to_string_lossy().into_owned();
    save(outer.path(), "evil.safetensors", &model_tensors());
    for shard in [
        absolute.as_str(),
        "../evil.safetensors",
        "sub/../../evil.safetensors",
        "",
        "..",
        "/",
        "pytorch_model.bin",
    ] {
        save_sharded_model(&dir);
        edit_index(&dir, |map| {
            map.insert(Q_PROJ.into(), json!(shard));
        });
        match ShardSet::open(&dir) {
            Err(CheckpointError::ShardPath { shard: got, .. }) => assert_eq!(got, shard),
            other => panic!("{shard}: {other:?}"),
        }
    }
}

#[test]
fn shards_in_a_sub_folder_are_fine() {
    let dir = tempdir().unwrap();
    save_config(dir.path());
    save(&dir.path().join("sub"), "a.safetensors", &model_tensors());
    let map: serde_json::Map<_, _> =
        model_tensors().into_iter().map(|((name, ..), _)| (name, json!("sub/a.safetensors"))).collect();
    save_json(dir.path(), "model.safetensors.index.json", &json!({ "weight_map": map }));
    assert_eq!(ShardSet::open(dir.path()).unwrap().tensors().len(), 4);
}

#[test]
fn link_that_leads_out_of_the_folder() {
    let outer = tempdir().unwrap();
    let dir = outer.path().join("model");
    save_model(&dir);
    fs::rename(dir.join("model.safetensors"), outer.path().join("secret.safetensors")).unwrap();
    symlink("../secret.safetensors", dir.join("model.safetensors")).unwrap();
    assert!(
        matches!(Checkpoint::open(&dir, None), Err(CheckpointError::LinkOut { file, .. }) if file.ends_with("model.safetensors"))
    );
}

#[test]
fn link_of_a_sub_folder_that_leads_out() {
    let outer = tempdir().unwrap();
    let dir = outer.path().join("model");
    save_config(&dir);
    save(&outer.path().join("elsewhere"), "a.safetensors", &model_tensors());
    symlink(outer.path().join("elsewhere"), dir.join("sub")).unwrap();
    let map: serde_json::Map<_, _> =
        model_tensors().into_iter().map(|((name, ..), _)| (name, json!("sub/a.safetensors"))).collect();
    save_json(&dir, "model.safetensors.index.json", &json!({ "weight_map": map }));
    assert!(matches!(ShardSet::open(&dir), Err(CheckpointError::LinkOut { .. })));
}

#[test]
fn link_of_the_config_that_leads_out() {
    let outer = tempdir().unwrap();
    let dir = outer.path().join("model");
    save_model(&dir);
    fs::rename(dir.join("config.json"), outer.path().join("config.json")).unwrap();
    symlink("../config.json", dir.join("config.json")).unwrap();
    assert!(matches!(Checkpoint::open(&dir, None), Err(CheckpointError::LinkOut { .. })));
}

#[test]
fn link_inside_the_folder_is_fine() {
    let dir = tempdir().unwrap();
    save_model(dir.path());
    fs::rename(dir.path().join("model.safetensors"), dir.path().join("real.safetensors")).unwrap();
    symlink("real.safetensors", dir.path().join("model.safetensors")).unwrap();
    assert_eq!(Checkpoint::open(dir.path(), None).unwrap().tensors().len(), 4);
}

#[test]
fn folder_that_is_itself_a_link_is_fine() {
    let outer = tempdir().unwrap();
    save_model(&outer.path().join("real"));
    symlink("real", outer.path().join("alias")).unwrap();
    assert_eq!(Checkpoint::open(&outer.path().join("alias"), None).unwrap().tensors().len(), 4);
}

/// `models--a--b` with the snapshot's files as links to blobs.
fn hub_cache(root: &Path) -> std::path::PathBuf {
    let repo = root.join("models--a--b");
    let (snapshot, blobs) = (repo.join("snapshots/0123abcd"), repo.join("blobs"));
    save_sharded_model(&snapshot);
    fs::create_dir_all(&blobs).unwrap();
    for (n, name) in names_in(&snapshot).iter().enumerate() {
        let blob = format!("{n:040x}");
        fs::rename(snapshot.join(name), blobs.join(&blob)).unwrap();
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    snapshot
}

#[test]
fn hub_cache_layout_works() {
    let root = tempdir().unwrap();
    let snapshot = hub_cache(root.path());
    let model = Checkpoint::open(&snapshot, None).unwrap();
    assert_eq!(model.tensors().len(), 4);
    assert_eq!(model.read_f32(Q_PROJ).unwrap(), ramp(24, -2.0));
}

#[test]
fn hub_cache_link_to_another_repositorys_blobs() {
    let root = tempdir().unwrap();
    let snapshot = hub_cache(root.path());
    let other = root.path().join("models--x--y/blobs");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("cfg"), b"{}").unwrap();
    fs::remove_file(snapshot.join("config.json")).unwrap();
    symlink("../../../models--x--y/blobs/cfg", snapshot.join("config.json")).unwrap();
    assert!(matches!(Checkpoint::open(&snapshot, None), Err(CheckpointError::LinkOut { .. })));
}

#[test]
fn blobs_beside_a_folder_that_is_no_snapshot_are_out() {
    let root = tempdir().unwrap();
    let snapshot = hub_cache(root.path());
    let renamed = snapshot.parent().unwrap().with_file_name("revisions");
    fs::rename(snapshot.parent().unwrap(), &renamed).unwrap();
    assert!(matches!(ShardSet::open(&renamed.join("0123abcd")), Err(CheckpointError::LinkOut { .. })));
}

#[test]
fn folder_of_pickles_only() {
    for file in ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "PYTORCH_MODEL.BIN"] {
        let dir = tempdir().unwrap();
        save_config(dir.path());
        fs::write(dir.path().join(file), b"\x80\x02").unwrap();
        assert!(
            matches!(Checkpoint::open(dir.path(), None), Err(CheckpointError::PickleOnly { file: got, .. }) if got == file)
        );
    }
}

#[test]
fn stray_pickle_beside_safetensors_is_ignored() {
    let dir = tempdir().unwrap();
    save_model(dir.path());
    fs::write(dir.path().join("pytorch_model.bin"), b"\x80\x02").unwrap();
    assert_eq!(Checkpoint::open(dir.path(), None).unwrap().tensors().len(), 4);
}

#[test]
fn folder_without_weights_and_path_without_folder() {
    let dir = tempdir().unwrap();
    assert!(matches!(Checkpoint::open(dir.path(), None), Err(CheckpointError::NoWeights { .. })));
    assert!(matches!(Checkpoint::open(&dir.path().join("none"), None), Err(CheckpointError::Io { .. })));
    fs::write(dir.path().join("file"), b"x").unwrap();
    assert!(matches!(Checkpoint::open(&dir.path().join("file"), None), Err(CheckpointError::Io { .. })));
}

#[test]
fn weights_that_are_a_folder_are_not_opened() {
    let dir = tempdir().unwrap();
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(matches!(ShardSet::open(dir.path()), Err(CheckpointError::NotAFile { .. })));
}

#[test]
fn single_file_beside_an_index_of_other_shards() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    save(dir.path(), "model.safetensors", &model_tensors());
    assert!(matches!(Checkpoint::open(dir.path(), None), Err(CheckpointError::Ambiguous { .. })));
}

#[test]
fn index_of_the_single_file_is_fine() {
    let dir = tempdir().unwrap();
    save_model(dir.path());
    let map: serde_json::Map<_, _> =
        model_tensors().into_iter().map(|((name, ..), _)| (name, json!("model.safetensors"))).collect();
    save_json(dir.path(), "model.safetensors.index.json", &json!({ "weight_map": map }));
    assert_eq!(ShardSet::open(dir.path()).unwrap().tensors().len(), 4);
}

#[test]
fn stale_shards_that_the_index_does_not_name_are_ignored() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    fs::write(dir.path().join("model-00003-of-00009.safetensors"), b"rubbish").unwrap();
    assert_eq!(ShardSet::open(dir.path()).unwrap().files().len(), 2);
}

#[test]
fn shard_cut_short_is_named() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    let path = dir.path().join(SHARD_2);
    let bytes = fs::read(&path).unwrap();
    for keep in 0..bytes.len() {
        fs::write(&path, &bytes[..keep]).unwrap();
        match ShardSet::open(dir.path()) {
            Err(error @ CheckpointError::Header { .. }) => {
                assert!(error.to_string().contains(SHARD_2));
                assert!(error.hint().is_some() || keep < 8, "{keep}");
            }
            other => panic!("{keep}: {other:?}"),
        }
    }
}

#[test]
fn file_that_shrinks_after_it_was_opened_is_an_error() {
    let dir = tempdir().unwrap();
    save_model(dir.path());
    let set = ShardSet::open(dir.path()).unwrap();
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let file = fs::File::options().write(true).open(dir.path().join("model.safetensors")).unwrap();
    file.set_len(bytes.len() as u64 - 4).unwrap();
    let last = set.in_file(&set.files()[0])[3].clone();
    match set.read(&last) {
        Err(CheckpointError::Io { path, source, .. }) => {
            assert!(path.ends_with("model.safetensors"));
            assert_eq!(source.kind(), std::io::ErrorKind::UnexpectedEof);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn reads_outside_a_tensor_are_refused() {
    let dir = tempdir().unwrap();
    save_model(dir.path());
    let set = ShardSet::open(dir.path()).unwrap();
    let info = set.get(Q_PROJ).unwrap().clone();
    let mut two = [0u8; 2];
    set.read_at(&info, info.bytes - 2, &mut two).unwrap();
    assert_eq!(two[..], set.read(&info).unwrap()[info.bytes as usize - 2..]);
    assert!(set.read_at(&info, info.bytes - 1, &mut two).is_err());
    assert!(set.read_at(&info, u64::MAX, &mut two).is_err());
    let forged = checkpoint::TensorInfo { bytes: u64::MAX, ..info };
    assert!(matches!(set.read(&forged), Err(CheckpointError::UnknownTensor { .. })));
}

#[test]
fn control_characters_in_tensor_and_file_names_are_escaped() {
    let dir = tempdir().unwrap();
    save_sharded_model(dir.path());
    edit_index(dir.path(), |map| {
        map.insert("ghost\u{1b}[2J".into(), json!(SHARD_1));
    });
    let message = ShardSet::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("ghost\\u{1b}[2J"), "{message}");

    edit_index(dir.path(), |map| {
        map.insert("w".into(), json!("../\u{7}x\n.safetensors"));
    });
    let message = ShardSet::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("\\u{7}x\\u{a}") && !message.chars().any(char::is_control), "{message}");
}

#[test]
fn missing_config_is_named() {
    let dir = tempdir().unwrap();
    fs::write(
        dir.path().join("model.safetensors"),
        safetensors_bytes(&default_metadata(), &model_tensors()).unwrap(),
    )
    .unwrap();
    let error = Checkpoint::open(dir.path(), None).unwrap_err();
    assert!(matches!(&error, CheckpointError::Config { file, .. } if file.ends_with("config.json")));
}
