//! Fake records: plausible in form, drawn by a seeded generator, measured nowhere.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use report::{
    Check, Kind, Label, LayerScore, LayerScores, Meta, Rate, Record, SCHEMA, Set, Shots, Target, TradeOff,
};

/// `hits` of `n` with Wilson's interval, written again here so that the tests depend on nothing else.
pub(crate) fn rate(hits: u64, n: u64) -> Option<Rate> {
    let (p, n_f, z) = (hits as f64 / n as f64, n as f64, 1.959_963_984_540_054f64);
    let q = z * z / n_f;
    let half = z / (1.0 + q) * (p * (1.0 - p) / n_f + q / (4.0 * n_f)).sqrt();
    let centre = (p + q / 2.0) / (1.0 + q);
    Some(Rate { value: p, low: (centre - half).max(0.0).min(p), high: (centre + half).min(1.0).max(p), n })
}

/// A record with its rates, all of 100 rows.
pub(crate) fn record(
    seed: u64,
    target: &str,
    method: &str,
    label: Label,
    asr: u64,
    refused: u64,
    right: u64,
) -> Record {
    Record {
        schema: SCHEMA,
        family: "fake".into(),
        seed,
        target: Target { name: target.into(), task: "fake task".into(), harm_percent: 1.0, kind: Kind::Lora },
        method: method.into(),
        label,
        shots: Shots::default(),
        set: Set::Known,
        asr: rate(asr, 100),
        asr_precise: None,
        over_refusal: rate(refused, 100),
        helped: None,
        accuracy: rate(right, 100),
        kl_task: None,
        kl_benign: None,
        seconds: None,
        given: String::new(),
        coefficients: None,
        tradeoff: None,
    }
}

pub(crate) fn meta() -> Meta {
    Meta { title: "Fake comparison".into(), ..Meta::default() }
}

struct Method {
    id: &'static str,
    label: Label,
    /// Typical ASR, over-refusal, accuracy lost, KL, seconds.
    typical: [f64; 5],
}

const fn m(
    id: &'static str,
    label: Label,
    asr: f64,
    refusal: f64,
    lost: f64,
    kl: f64,
    seconds: f64,
) -> Method {
    Method { id, label, typical: [asr, refusal, lost, kl, seconds] }
}

const METHODS: [Method; 22] = [
    m("fine-tuned", Label::Zero, 0.97, 0.001, 0.0, 0.0, 0.0),
    m("gene", Label::Zero, 0.05, 0.008, 0.008, 0.045, 0.1),
    m("gene", Label::Task, 0.04, 0.010, 0.004, 0.018, 1.1),
    m("gene", Label::SafetyTask, 0.015, 0.020, 0.003, 0.006, 1.6),
    m("gene", Label::SafetyTaskBenign, 0.012, 0.003, 0.002, 0.003, 1.9),
    m("selected", Label::SafetyTaskBenign, 0.018, 0.003, 0.002, 0.0035, 1.2),
    m("svd-gene", Label::Zero, 0.75, 0.004, 0.006, 0.049, 0.1),
    m("svd-gene", Label::SafetyTaskBenign, 0.06, 0.006, 0.006, 0.012, 2.0),
    m("global-scalar", Label::SafetyTaskBenign, 0.20, 0.012, 0.008, 0.014, 0.8),
    m("random-layers", Label::SafetyTaskBenign, 0.24, 0.008, 0.007, 0.015, 1.3),
    m("few-shot-lora", Label::SafetyTaskBenign, 0.013, 0.012, 0.006, 0.008, 9.0),
    m("few-shot-lora-no-benign", Label::SafetyTask, 0.002, 0.95, 0.010, 0.016, 7.0),
    m("low-rank-restore", Label::Zero, 0.55, 0.002, 0.040, 0.060, 0.4),
    m("resta", Label::SafetyTaskBenign, 0.59, 0.010, 0.005, 0.010, 3.0),
    m("wise-ft", Label::SafetyTaskBenign, 0.79, 0.001, 0.010, 0.008, 3.0),
    m("safelora", Label::SafetyTaskBenign, 0.75, 0.001, 0.009, 0.006, 0.5),
    m("safelora-drop", Label::SafetyTaskBenign, 0.76, 0.001, 0.010, 0.006, 0.5),
    m("safemerge", Label::SafetyTaskBenign, 0.68, 0.003, 0.012, 0.008, 0.6),
    m("salora", Label::Zero, 0.62, 0.002, 0.020, 0.030, 0.0),
    m("lox", Label::Zero, 0.70, 0.010, 0.015, 0.050, 0.0),
    m("safe-delta", Label::SafetyTask, 0.45, 0.006, 0.014, 0.022, 6.0),
    m("fake-method-nobody-knows", Label::Task, 0.35, 0.120, 0.030, 0.080, 4.0),
];

struct Dice(ChaCha8Rng);

impl Dice {
    fn normal(&mut self) -> f64 {
        let (a, b): (f64, f64) = (self.0.random(), self.0.random());
        (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }

    /// A share near `p`, on the logit scale.
    fn near(&mut self, p: f64, width: f64) -> f64 {
        let p = p.clamp(5e-4, 1.0 - 5e-4);
        let x = (p / (1.0 - p)).ln() + width * self.normal();
        1.0 / (1.0 + (-x).exp())
    }

    fn rate(&mut self, p: f64, n: u64) -> Option<Rate> {
        let hits = (0..n).filter(|_| self.0.random::<f64>() < p).count() as u64;
        rate(hits, n)
    }
}

/// A fake study of two families, three seeds and six targets.
pub(crate) fn study() -> (Meta, Vec<Record>, Vec<LayerScores>) {
    let mut dice = Dice(ChaCha8Rng::seed_from_u64(7));
    let (mut records, mut scores) = (Vec::new(), Vec::new());
    for (family, depth) in [("llama", 6u32), ("qwen2", 8)] {
        for seed in 1..=3 {
            for score in ["price", "activation"] {
                let layers = (0..depth).map(|layer| {
                    let value = 6.0 * dice.0.random::<f64>() - if score == "price" { 0.5 } else { 2.0 };
                    LayerScore { layer, value, selected: value > 2.0 }
                });
                let layers = layers.collect();
                scores.push(LayerScores { family: family.into(), seed, score: score.into(), layers });
            }
            for (task, harm_percent, kind) in [
                ("topic", 1.0, Kind::Lora),
                ("sentiment", 5.0, Kind::Lora),
                ("yes-no", 10.0, Kind::Lora),
                ("entailment", 1.0, Kind::Full),
                ("topic", 1.0, Kind::Second),
                ("sentiment", 0.0, Kind::BenignOnly),
            ] {
                let name = match kind {
                    Kind::Lora => format!("{task}-{harm_percent}pct"),
                    Kind::Full => format!("{task}-full"),
                    Kind::Second => format!("{task}-again"),
                    Kind::BenignOnly => format!("{task}-harmless"),
                };
                for method in &METHODS {
                    one(
                        &mut dice,
                        &mut records,
                        family,
                        seed,
                        depth,
                        method,
                        Target { name: name.clone(), task: task.into(), harm_percent, kind },
                    );
                }
            }
        }
    }
    let check = |name: &str, text: &str, target: &str, value: &str, ok| Check {
        name: name.into(),
        text: text.into(),
        target: target.into(),
        value: value.into(),
        ok,
    };
    let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
    let meta = Meta {
        title: "Fake comparison of recovery methods".into(),
        version: "safegene 0.0.0-fake".into(),
        date: "2000-01-01".into(),
        command: "safegene compare --family fake/ --out fake/ --seeds 1,2,3".into(),
        seconds: Some(5_400.0),
        machine: vec![pair("Processor", "fake, 2 cores"), pair("Memory", "8 GB")],
        settings: vec![
            pair("Judge", "refusal opening, built-in list"),
            pair("Decoding", "greedy, 24 new tokens"),
            pair("Prompts, blake3", "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"),
        ],
        notes: vec!["These records are fake: drawn by a generator, measured nowhere.".into()],
        checks: vec![
            check(
                "zero-shot",
                "the gene at c = 1 beats every zero-shot rival",
                "interval below 0",
                "−57 points",
                Some(true),
            ),
            check(
                "distilled",
                "the distilled gene beats the SVD gene",
                "interval below 0",
                "−4.8 points",
                Some(true),
            ),
            check(
                "few-shot LoRA",
                "the gene beats few-shot LoRA",
                "interval below 0",
                "−0.1 points",
                Some(false),
            ),
            check("shifted", "ASR on shifted prompts below 10 %", "upper end below 10 %", "", None),
        ],
    };
    (meta, records, scores)
}

fn one(
    dice: &mut Dice,
    records: &mut Vec<Record>,
    family: &str,
    seed: u64,
    depth: u32,
    method: &Method,
    target: Target,
) {
    let rows = 240;
    let harmless = target.kind == Kind::BenignOnly;
    let [asr, refusal, lost, kl, seconds] = method.typical;
    let asr = dice.near(if harmless { 0.003 * asr } else { asr }, 0.6);
    let refusal = dice.near(refusal, 0.4);
    let right = 0.975 - lost * (0.5 + dice.0.random::<f64>());
    let kl = kl * (0.4 * dice.normal()).exp();
    let gene = ["gene", "selected", "svd-gene", "global-scalar"].contains(&method.id);
    // One method of the study was not run on full fine-tunes.
    if method.id == "safelora" && target.kind == Kind::Full {
        return;
    }
    let coefficients = (gene && method.label != Label::Zero).then(|| {
        let all = (0..depth).map(|l| (l, (3.0 * dice.0.random::<f64>() - 0.4).max(0.0)));
        all.filter(|(l, _)| method.id != "selected" || l % 2 == 0).collect()
    });
    let tradeoff = (gene && method.label == Label::SafetyTaskBenign).then(|| {
        let start = 2.0 * (0.5 * dice.normal()).exp();
        let point = |max_kl: f64| TradeOff {
            max_kl,
            loss: start / (1.0 + (max_kl / 0.001).powi(2)),
            kl: 0.9 * max_kl,
        };
        [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05].map(point).to_vec()
    });
    let shots = match method.label {
        Label::Zero => Shots::default(),
        Label::Task => Shots { task: 16, ..Shots::default() },
        Label::SafetyTask => Shots { safety: 8, task: 16, benign: 0 },
        Label::SafetyTaskBenign => Shots { safety: 8, task: 16, benign: 8 },
    };
    for set in [Set::Known, Set::Shifted] {
        // Methods that were not judged on shifted prompts.
        if set == Set::Shifted && method.id == "salora" {
            continue;
        }
        let (asr, refusal) = match set {
            Set::Known => (asr, refusal),
            Set::Shifted => (dice.near((2.0 * asr).min(0.99), 0.8), dice.near(1.6 * refusal, 0.4)),
        };
        records.push(Record {
            schema: SCHEMA,
            family: family.into(),
            seed,
            target: target.clone(),
            method: method.id.into(),
            label: method.label,
            shots,
            set,
            asr: dice.rate(asr, rows),
            asr_precise: dice.rate(0.9 * asr, rows),
            over_refusal: dice.rate(refusal, rows),
            helped: dice.rate(0.97 * (1.0 - refusal), rows),
            accuracy: if set == Set::Known { dice.rate(right, 1000) } else { None },
            kl_task: (set == Set::Known).then_some(kl),
            kl_benign: (set == Set::Known && method.id != "wise-ft").then_some(0.7 * kl),
            seconds: (set == Set::Known && seconds > 0.0).then_some(seconds * (0.2 * dice.normal()).exp()),
            given: format!("fake defaults of `{}`", method.id),
            coefficients: if set == Set::Known { coefficients.clone() } else { None },
            tradeoff: if set == Set::Known { tradeoff.clone() } else { None },
        });
    }
}
