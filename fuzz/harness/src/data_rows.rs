//! libFuzzer around [`fuzz::data_rows`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    fuzz::data_rows(bytes);
});
