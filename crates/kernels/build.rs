//! Embeds machine code of the CUDA kernels, if there is any: the files of the folder `SAFEGENE_KERNELS`.
//!
//! The folder also has the source that its images were compiled from (`safegene.cu`); images of other sources are not
//! embedded, and that is said. Without the folder nothing is embedded, and nothing of CUDA is needed.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-env-changed=SAFEGENE_KERNELS");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../../kernels");
    let mut list = String::new();
    if let Some(folder) = env::var_os("SAFEGENE_KERNELS").filter(|folder| !folder.is_empty()) {
        for (name, path) in images(&PathBuf::from(folder)) {
            let _ = writeln!(list, "    ({name:?}, include_bytes!({:?})),", path.display().to_string());
        }
    }
    let text = format!(
        "/// Images by name: `sm_90.cubin`, `compute_75.ptx`.\npub(super) static EMBEDDED: &[(&str, &[u8])] = &[\n{list}];\n"
    );
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("images.rs");
    if let Err(error) = fs::write(&out, text) {
        println!("cargo::error=cannot write `{}`: {error}", out.display());
    }
}

/// The images of a folder, if they were made from these sources.
fn images(folder: &Path) -> Vec<(String, PathBuf)> {
    println!("cargo::rerun-if-changed={}", folder.display());
    let kernels = Path::new("../../kernels");
    let order = fs::read_to_string(kernels.join("ORDER")).unwrap_or_default();
    let source: String =
        order.lines().map(|name| fs::read_to_string(kernels.join(name)).unwrap_or_default()).collect();
    if fs::read_to_string(folder.join("safegene.cu")).ok().as_deref() != Some(source.as_str()) {
        println!("cargo::warning=no kernels embedded: `{}` is not made from these sources", folder.display());
        return Vec::new();
    }
    let mut found: Vec<(String, PathBuf)> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path().canonicalize().ok()?)))
        .filter(|(name, _)| name.ends_with(".cubin") || name.ends_with(".ptx"))
        .collect();
    found.sort();
    found
}
