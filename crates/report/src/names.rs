//! Names of methods, in the order in which tables show them.
//!
//! A method that is not listed is shown by its id, after the others.

use crate::record::{Kind, Label};

/// The target as it is.
pub(crate) const FINE_TUNED: &str = "fine-tuned";

/// Id, name, where it comes from.
const METHODS: [(&str, &str, &str); 21] = [
    (FINE_TUNED, "Fine-tuned", "the target as it is"),
    (
        "gene",
        "Gene",
        "distilled from the extracted gene on drifts of other tasks and further safety and benign rows, one scalar a layer",
    ),
    ("selected", "Gene, selected layers", "distilled, calibrated on selected layers"),
    ("svd-gene", "SVD gene", "control: extracted, not distilled; a degraded checkpoint"),
    ("fresh-gene", "Gene from random factors", "control: distilled, but not from extracted factors"),
    ("global-scalar", "Gene, one scalar", "control: one scalar for all layers"),
    ("least-kl", "Gene, least KL", "control: least KL on the shots instead of near 1"),
    ("random-layers", "Gene, random layers", "control: layers drawn by chance"),
    ("few-shot-lora", "Few-shot LoRA", "a LoRA trained on the same shots under the same limit"),
    ("few-shot-lora-no-benign", "Few-shot LoRA, no benign", "the same without benign shots"),
    ("low-rank-restore", "Low-rank restore", "truncated difference from the aligned model"),
    ("resta", "RESTA", "arXiv 2402.11746; a degraded checkpoint"),
    (
        "resta-equal-kl",
        "RESTA at the gene's KL",
        "the same; its limit is the larger of the two KL that the gene spends on the same shots",
    ),
    ("wise-ft", "WiSE-FT", "arXiv 2412.19512"),
    ("safelora", "SafeLoRA", "arXiv 2405.16833; the base model"),
    ("safelora-orthonormal", "SafeLoRA, orthonormal", "the same with an orthonormal projector"),
    ("safelora-drop", "Drop the LoRA", "control: the LoRA left out on the modules that SafeLoRA takes"),
    ("safemerge", "SafeMERGE", "arXiv 2503.17239; a LoRA trained on further safety rows"),
    ("salora", "SaLoRA", "arXiv 2501.01765; further safety and task rows, trained again"),
    ("lox", "LoX", "arXiv 2506.15606; the base model, trained again"),
    ("safe-delta", "Safe Delta", "arXiv 2505.12038; further safety rows"),
];

/// Where a method stands: listed ones first, then the others by id.
pub(crate) fn place(id: &str) -> (usize, &str) {
    (METHODS.iter().position(|m| m.0 == id).unwrap_or(METHODS.len()), id)
}

/// What to call a method. Unlisted ids are outside text: escape it.
pub(crate) fn method(id: &str) -> &str {
    METHODS.iter().find(|m| m.0 == id).map_or(id, |m| m.1)
}

/// Where a method comes from and what it takes besides the aligned model and the shots; empty for unlisted ones. What stands
/// in brackets behind an id, such as a number of shots, changes nothing.
pub(crate) fn source(id: &str) -> &'static str {
    let id = id.split_once(" (").map_or(id, |(method, _)| method);
    METHODS.iter().find(|m| m.0 == id).map_or("", |m| m.2)
}

/// What a method saw, in a table.
pub(crate) fn label(label: Label) -> &'static str {
    match label {
        Label::Zero => "none",
        Label::Task => "task",
        Label::SafetyTask => "safety + task",
        Label::SafetyTaskBenign => "safety + task + benign",
    }
}

/// The same in a picture.
pub(crate) fn label_short(label: Label) -> &'static str {
    match label {
        Label::Zero => "no shots",
        Label::Task => "t",
        Label::SafetyTask => "s+t",
        Label::SafetyTaskBenign => "s+t+b",
    }
}

/// How a target came to be.
pub(crate) fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Lora => "LoRA",
        Kind::Full => "full fine-tune",
        Kind::Second => "second generation",
        Kind::BenignOnly => "harmless rows only",
    }
}
