//! Folders that appear whole or not at all.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use checkpoint::{
    Checkpoint, CheckpointError, Dtype, FolderWriter, PARTIAL_MARKER, TensorSpec, default_metadata,
    safetensors_bytes,
};
use tempfile::tempdir;

use crate::support::*;

fn spec(name: &str, sides: &[u64]) -> TensorSpec {
    (name.to_owned(), Dtype::Bf16, sides.to_vec())
}

#[test]
fn golden_bytes_of_a_tiny_file() {
    let bytes =
        safetensors_bytes(&default_metadata(), &[tensor("w", Dtype::F32, &[1, 2], &[1.0, -2.0])]).unwrap();
    let json = r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
    let mut want = 88u64.to_le_bytes().to_vec();
    want.extend_from_slice(format!("{json:<88}").as_bytes());
    want.extend_from_slice(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
    assert_eq!(bytes, want);
}

#[test]
fn copy_of_a_model_is_published_and_reads_the_same() {
    let root = tempdir().unwrap();
    let (from, out) = (root.path().join("from"), root.path().join("deep/er/out"));
    save_sharded_model(&from);
    let source = Checkpoint::open(&from, None).unwrap();
    let writer = FolderWriter::create(&out, false).unwrap();
    for file in source.shards().files() {
        let tensors = source.shards().in_file(file);
        let specs: Vec<TensorSpec> =
            tensors.iter().map(|info| (info.name.clone(), info.dtype, info.shape.clone())).collect();
        let name = file.file_name().unwrap().to_str().unwrap();
        let mut shard = writer.shard(name, &default_metadata(), &specs).unwrap();
        for info in tensors {
            for part in source.shards().read(info).unwrap().chunks(7) {
                shard.write(&info.name, part).unwrap();
            }
        }
        shard.finish().unwrap();
        assert_eq!(fs::read(writer.partial().join(name)).unwrap(), fs::read(file).unwrap());
    }
    let index = "model.safetensors.index.json";
    writer.file(index, &fs::read(from.join(index)).unwrap()).unwrap();
    assert_eq!(writer.copy_support_files(&from).unwrap(), ["config.json"]);
    assert!(!out.exists());
    writer.publish().unwrap();
    assert_eq!(names_in(out.parent().unwrap()), ["out"]);
    assert_eq!(names_in(&out), names_in(&from));
    assert_eq!(Checkpoint::open(&out, None).unwrap().content().unwrap(), source.content().unwrap());
}

#[test]
fn dropped_writer_leaves_nothing() {
    let root = tempdir().unwrap();
    let writer = FolderWriter::create(&root.path().join("out"), false).unwrap();
    writer.file("a.json", b"{}").unwrap();
    assert_eq!(names_in(root.path()), ["out.partial"]);
    drop(writer);
    assert!(names_in(root.path()).is_empty());
}

#[test]
fn existing_output_without_force() {
    let root = tempdir().unwrap();
    let out = root.path().join("out");
    save_model(&out);
    let before = fs::read(out.join("model.safetensors")).unwrap();
    assert!(matches!(FolderWriter::create(&out, false), Err(CheckpointError::OutputExists { .. })));
    assert_eq!(names_in(root.path()), ["out"]);
    assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), before);
}

#[test]
fn existing_output_with_force_is_replaced_at_publish() {
    let root = tempdir().unwrap();
    let out = root.path().join("out");
    save_model(&out);
    let writer = FolderWriter::create(&out, true).unwrap();
    writer.file("gene.json", b"{}").unwrap();
    assert_eq!(names_in(&out), ["config.json", "model.safetensors"]);
    writer.publish().unwrap();
    assert_eq!(names_in(&out), ["gene.json"]);
    assert_eq!(names_in(root.path()), ["out"]);
}

#[test]
fn force_does_not_remove_what_is_no_output() {
    let root = tempdir().unwrap();
    let out = root.path().join("photos");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("cat.jpg"), b"cat").unwrap();
    assert!(matches!(FolderWriter::create(&out, true), Err(CheckpointError::OutputForeign { .. })));
    let file = root.path().join("file");
    fs::write(&file, b"text").unwrap();
    assert!(matches!(FolderWriter::create(&file, true), Err(CheckpointError::OutputForeign { .. })));
    let link = root.path().join("link");
    symlink(&out, &link).unwrap();
    assert!(matches!(FolderWriter::create(&link, true), Err(CheckpointError::OutputForeign { .. })));
    assert_eq!(fs::read(out.join("cat.jpg")).unwrap(), b"cat");
}

#[test]
fn output_that_appears_meanwhile_is_kept() {
    let root = tempdir().unwrap();
    let out = root.path().join("out");
    let writer = FolderWriter::create(&out, false).unwrap();
    writer.file("gene.json", b"mine").unwrap();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("gene.json"), b"theirs").unwrap();
    assert!(matches!(writer.publish(), Err(CheckpointError::OutputExists { .. })));
    assert_eq!(fs::read(out.join("gene.json")).unwrap(), b"theirs");
    assert_eq!(names_in(root.path()), ["out"]);
}

#[test]
fn partial_folder_of_a_killed_run_is_used_again() {
    let root = tempdir().unwrap();
    let partial = root.path().join("out.partial");
    fs::create_dir_all(partial.join("sub")).unwrap();
    fs::write(partial.join(PARTIAL_MARKER), b"").unwrap();
    fs::write(partial.join("half.safetensors"), b"x").unwrap();
    let writer = FolderWriter::create(&root.path().join("out"), false).unwrap();
    writer.file("gene.json", b"{}").unwrap();
    writer.publish().unwrap();
    assert_eq!(names_in(&root.path().join("out")), ["gene.json"]);
}

#[test]
fn partial_folder_of_somebody_else_is_kept() {
    let root = tempdir().unwrap();
    let partial = root.path().join("out.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("thesis.tex"), b"x").unwrap();
    assert!(matches!(
        FolderWriter::create(&root.path().join("out"), true),
        Err(CheckpointError::OutputForeign { found }) if found == partial
    ));
    assert_eq!(names_in(&partial), ["thesis.tex"]);
}

#[test]
fn two_writers_of_one_output() {
    let root = tempdir().unwrap();
    let out = root.path().join("out");
    let first = FolderWriter::create(&out, false).unwrap();
    first.file("a.json", b"{}").unwrap();
    assert!(matches!(FolderWriter::create(&out, false), Err(CheckpointError::OutputBusy { .. })));
    first.publish().unwrap();
    assert_eq!(names_in(&out), ["a.json"]);
}

#[test]
fn unwritable_parent_is_an_ordinary_error() {
    let root = tempdir().unwrap();
    let locked = root.path().join("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    let privileged = fs::write(locked.join("probe"), b"x").is_ok();
    if !privileged {
        assert!(matches!(FolderWriter::create(&locked.join("out"), false), Err(CheckpointError::Io { .. })));
    }
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o755)).unwrap();
    // A parent that is a file cannot be written by anybody.
    fs::write(root.path().join("file"), b"x").unwrap();
    match FolderWriter::create(&root.path().join("file/out"), false) {
        Err(CheckpointError::Io { path, .. }) => assert!(path.starts_with(root.path().join("file"))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn output_without_a_name() {
    for out in ["/", "..", ""] {
        assert!(
            matches!(FolderWriter::create(out.as_ref(), false), Err(CheckpointError::OutputName { .. })),
            "{out}"
        );
    }
}

#[test]
fn file_names_that_leave_the_folder() {
    let root = tempdir().unwrap();
    let writer = FolderWriter::create(&root.path().join("out"), false).unwrap();
    for name in ["../x", "/x", "a/b", "..", ".", "", "a/", PARTIAL_MARKER, "a\0b"] {
        assert!(matches!(writer.file(name, b""), Err(CheckpointError::FileName { .. })), "{name:?}");
        assert!(writer.shard(name, &default_metadata(), &[]).is_err(), "{name:?}");
    }
}

#[test]
fn byte_counts_and_order_are_enforced() {
    let root = tempdir().unwrap();
    let writer = FolderWriter::create(&root.path().join("out"), false).unwrap();
    let specs = [spec("a", &[2]), spec("empty", &[0]), spec("b", &[1])];
    let start = |file: &str| writer.shard(file, &default_metadata(), &specs).unwrap();

    let problem = |result: Result<(), CheckpointError>| match result {
        Err(CheckpointError::WriteOrder { problem, .. }) => problem,
        other => panic!("{other:?}"),
    };
    assert_eq!(problem(start("1").write("b", &[0; 2])), "tensor `a` is next, `b` was given");
    assert_eq!(problem(start("2").write("a", &[0; 5])), "tensor `a` lacks 4 bytes, 5 were given");
    let mut shard = start("3");
    shard.write("a", &[0; 3]).unwrap();
    assert_eq!(problem(shard.write("b", &[0; 2])), "tensor `a` still lacks 1 bytes when `b` begins");
    let mut shard = start("4");
    shard.write("a", &[0; 4]).unwrap();
    assert_eq!(problem(shard.finish()), "tensor `b` still lacks 2 bytes");
    let mut shard = start("5");
    shard.write("a", &[0; 4]).unwrap();
    shard.write("empty", &[]).unwrap();
    shard.write("b", &[0; 2]).unwrap();
    assert_eq!(problem(shard.write("b", &[0; 2])), "tensor `b` comes after the last");
    shard.finish().unwrap();
    // Four files were begun and not finished.
    assert!(matches!(writer.publish(), Err(CheckpointError::WriteOrder { .. })));
    assert!(names_in(root.path()).is_empty());
}

#[test]
fn shard_twice_and_tensor_twice() {
    let root = tempdir().unwrap();
    let writer = FolderWriter::create(&root.path().join("out"), false).unwrap();
    writer.shard("a.safetensors", &default_metadata(), &[]).unwrap().finish().unwrap();
    assert!(matches!(
        writer.shard("a.safetensors", &default_metadata(), &[]),
        Err(CheckpointError::Io { .. })
    ));
    for specs in [
        vec![spec("a", &[1]), spec("a", &[1])],
        vec![spec("__metadata__", &[1])],
        vec![spec("a", &[1 << 40, 1 << 40])],
    ] {
        assert!(matches!(
            writer.shard("b.safetensors", &default_metadata(), &specs),
            Err(CheckpointError::WriteOrder { .. })
        ));
    }
}

#[test]
fn support_files_without_weights_pickles_and_training_state() {
    let root = tempdir().unwrap();
    let from = root.path().join("from");
    save_sharded_model(&from);
    let wanted =
        ["chat_template.jinja", "config.json", "modeling_x.py", "tokenizer.json", "tokenizer_config.json"];
    let unwanted = [
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "trainer_state.json",
        "stale.safetensors",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "model.gguf",
        ".gitattributes",
        "safegene.json",
        "adapter_config.json",
    ];
    for name in wanted.iter().chain(&unwanted).filter(|name| **name != "config.json") {
        fs::write(from.join(name), name).unwrap();
    }
    fs::create_dir(from.join("original")).unwrap();
    fs::set_permissions(from.join("tokenizer.json"), fs::Permissions::from_mode(0o444)).unwrap();
    let writer = FolderWriter::create(&root.path().join("out"), false).unwrap();
    writer.file("tokenizer_config.json", b"my own").unwrap();
    let copied = writer.copy_support_files(&from).unwrap();
    assert_eq!(copied, ["chat_template.jinja", "config.json", "modeling_x.py", "tokenizer.json"]);
    writer.publish().unwrap();
    let out = root.path().join("out");
    assert_eq!(names_in(&out), wanted);
    assert_eq!(fs::read(out.join("tokenizer_config.json")).unwrap(), b"my own");
    assert_eq!(fs::metadata(out.join("tokenizer.json")).unwrap().permissions().mode() & 0o200, 0o200);
}

#[test]
fn support_file_that_links_out_is_refused() {
    let root = tempdir().unwrap();
    let from = root.path().join("from");
    save_model(&from);
    fs::write(root.path().join("secret"), b"secret").unwrap();
    symlink("../secret", from.join("tokenizer.json")).unwrap();
    let writer = FolderWriter::create(&root.path().join("out"), false).unwrap();
    assert!(matches!(writer.copy_support_files(&from), Err(CheckpointError::LinkOut { .. })));
}

#[test]
fn data_starts_at_a_multiple_of_eight_for_any_header() {
    for length in 1..20 {
        let bytes =
            safetensors_bytes(&default_metadata(), &[tensor(&"n".repeat(length), Dtype::Bf16, &[1], &[1.0])])
                .unwrap();
        assert_eq!((bytes.len() - 2) % 8, 0, "{length}");
    }
}
