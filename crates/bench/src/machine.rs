//! Which machine this is, from `/proc`.

use serde::Serialize;

/// Facts that stand beside a measured number.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// As the processor calls itself.
    pub cpu: String,
    /// Logical cores that this process may use.
    pub cores: usize,
    /// Main memory.
    pub memory_bytes: u64,
    /// The widest vectors: `avx512`, `avx2` or `scalar`.
    pub vectors: &'static str,
}

impl Machine {
    /// This machine.
    pub fn new() -> Machine {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kb = memory.and_then(|text| text.strip_suffix(" kB")?.trim().parse::<u64>().ok());
        let flags = field(&cpu, "flags").unwrap_or_default();
        let has = |flag: &str| flags.split(' ').any(|found| found == flag);
        Machine {
            cpu: field(&cpu, "model name").unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kb.unwrap_or(0) * 1024,
            vectors: if has("avx512f") {
                "avx512"
            } else if has("avx2") && has("fma") {
                "avx2"
            } else {
                "scalar"
            },
        }
    }
}

impl Default for Machine {
    fn default() -> Machine {
        Machine::new()
    }
}

/// Largest resident size of this process so far; `None` where the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}
