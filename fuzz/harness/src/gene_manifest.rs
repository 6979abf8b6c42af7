//! libFuzzer around [`fuzz::gene_manifest`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    fuzz::gene_manifest(bytes);
});
