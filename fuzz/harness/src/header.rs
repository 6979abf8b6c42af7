//! libFuzzer around [`fuzz::header`]. Three changes of four have their length prefix put right.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|bytes: &[u8]| {
    fuzz::header(bytes);
});

fuzz_mutator!(|bytes: &mut [u8], used: usize, most: usize, seed: u32| {
    let used = fuzzer_mutate(bytes, used, most);
    if seed % 4 == 0 {
        return used;
    }
    let repaired = fuzz::repaired_header(bytes[..used].to_vec());
    let used = repaired.len().min(most);
    bytes[..used].copy_from_slice(&repaired[..used]);
    used
});
