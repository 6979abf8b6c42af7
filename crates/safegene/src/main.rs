//! `safegene`: arguments, progress, reports, exit codes. The only crate that prints or reads the environment.
//!
//! | exit | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | the answer is no (a gate or a verification failed) |
//! | 2 | usage |
//! | 3 | an input is invalid (do not retry) |
//! | 75 | interrupted or temporary (retry) |

mod args;
mod commands;
mod device;
mod fail;
mod model_args;
mod ui;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    // candle's own pool spins while it waits; rayon's threads do the work here.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: nothing has been started yet, so no other thread reads or writes the environment.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    // Left to itself, candle counts the cores by reading /proc/cpuinfo in every product: a tenth of a small model's time.
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // SAFETY: as above.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", cores.to_string()) };
    }
    keep_freed_memory();
    let args = args::Args::parse();
    let ui = ui::Ui::new(args.quiet);
    match commands::run(args, &ui) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            ui.failure(&failure);
            ExitCode::from(failure.code as u8)
        }
    }
}

/// Blocks of up to 32 MiB come from the heap and stay with it when they are freed: the same sizes are asked for all the
/// time, and pages fresh from the system cost more than the work on them.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_freed_memory() {
    // SAFETY: mallopt only changes settings of the allocator; nothing else runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 20);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_freed_memory() {}
