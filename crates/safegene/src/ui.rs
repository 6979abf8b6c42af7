//! What people see: progress bars on a terminal, plain lines otherwise, nothing with `--quiet`.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use crate::fail::Failure;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::Mutex;

/// Where messages go.
pub(crate) struct Ui {
    quiet: bool,
    bars: Option<MultiProgress>,
}

/// One running piece of work.
pub(crate) struct Work {
    bar: Option<ProgressBar>,
    name: String,
    lines: bool,
    state: Mutex<(u64, u64, u64)>,
}

impl Ui {
    pub(crate) fn new(quiet: bool) -> Self {
        let bars = (!quiet && std::io::stderr().is_terminal())
            .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self { quiet, bars }
    }

    /// A line for people.
    pub(crate) fn say(&self, text: &str) {
        if self.quiet {
            return;
        }
        match &self.bars {
            Some(bars) => {
                let _ = bars.println(text);
            }
            None => eprintln!("{text}"),
        }
    }

    /// Something that should not be overlooked, also with `--quiet`.
    pub(crate) fn warn(&self, text: &str) {
        match &self.bars {
            Some(bars) => {
                let _ = bars.println(format!("warning: {text}"));
            }
            None => eprintln!("warning: {text}"),
        }
    }

    /// Data, to stdout. A closed pipe ends quietly.
    pub(crate) fn data(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{text}");
        let _ = out.flush();
    }

    /// Work of `total` units (`bytes` or steps).
    pub(crate) fn work(&self, name: &str, total: u64, bytes: bool) -> Work {
        let bar = self.bars.as_ref().map(|bars| {
            let units = if bytes { "{bytes}/{total_bytes}  {bytes_per_sec}" } else { "{pos}/{len}" };
            let template = format!("  {{prefix:12}} {{bar:24}} {units}  {{eta}} left  {{wide_msg}}");
            let style =
                ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = bars.add(ProgressBar::new(total).with_style(style));
            bar.set_prefix(name.to_string());
            bar
        });
        let lines = !self.quiet && bar.is_none();
        Work { bar, name: name.into(), lines, state: Mutex::new((0, total, 0)) }
    }

    pub(crate) fn failure(&self, failure: &Failure) {
        eprintln!("error: {}", failure.message);
        for cause in &failure.causes {
            eprintln!("  caused by: {cause}");
        }
        if let Some(hint) = &failure.hint {
            eprintln!("\nhint: {hint}");
        }
    }
}

impl Work {
    /// `units` more are done; without a terminal, a line at every tenth.
    pub(crate) fn advance(&self, units: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.inc(units);
            bar.set_message(message.to_string());
        }
        if !self.lines {
            return;
        }
        if let Ok(mut state) = self.state.lock() {
            let (done, total, tenth) = &mut *state;
            *done += units;
            let now = (*done * 10).checked_div(*total).unwrap_or(10);
            if now > *tenth {
                *tenth = now;
                eprintln!("  {:12} {:3} %  {message}", self.name, now * 10);
            }
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
