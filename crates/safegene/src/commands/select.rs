//! `safegene select`: which layers of a gene are kept.

use crate::commands::calibrate::read_refusals;
use crate::commands::evaluate::{chat_of, fields, hash, named};
use crate::commands::models::Shelf;
use crate::commands::openings;
use crate::fail::Failure;
use crate::model_args::{By, Select};
use crate::ui::Ui;
use checkpoint::Checkpoint;
use distill::GeneAttachments;
use distill::select::{Keep, LayerScore, Score, choose, scores};
use evaluate::read_rows;
use gene::{Gene, LayerEntry};
use transformer::Row;

/// Width of the bars.
const BAR: usize = 32;

pub(super) fn run(job: &Select, ui: &Ui) -> Result<(), Failure> {
    let gene = Gene::open(&job.gene)?;
    let model = Checkpoint::open(&job.model, job.base.as_deref())?;
    gene::check_family(&gene, &model)?;
    let chat = chat_of(&model)?;
    let (fields, openings) = (fields(&job.fields), openings(job.fields.refusals.as_deref())?);
    let harmful = read_refusals(&job.harmful, &fields, &openings, &Ok)?;
    let benign = read_rows(&job.benign, &fields, true)?;
    let encode = |rows: &[evaluate::DataRow]| -> Result<Vec<Row>, Failure> {
        rows.iter().map(|r| Ok(chat.row(&r.prompt, r.answer.as_deref().unwrap_or(""))?)).collect()
    };
    let (mut harmful_rows, benign_rows) = (encode(&harmful)?, encode(&benign)?);
    // As calibration sees them.
    chat.cut_to_openings(&mut harmful_rows, &openings)?;
    let score = match job.score {
        By::Price => Score::Price,
        By::Insertion => Score::Insertion,
        By::Activation => Score::Activation,
    };
    let keep = match (job.top, job.mass) {
        (Some(k), _) => Keep::Top(k),
        (None, Some(share)) => Keep::Mass(share),
        (None, None) => {
            return Err(Failure::usage("nothing says how many layers are kept", "give --top or --mass"));
        }
    };
    let mut options = serde_json::json!({
        "score": score,
        "keep": keep,
        "gene": gene.content(),
        "model": model.content()?,
        "harmful": hash(Some(&job.harmful))?,
        "benign": hash(Some(&job.benign))?,
        "refusals": { "cut": "openings", "content": hash(job.fields.refusals.as_deref())? },
    });
    if let named @ serde_json::Value::Object(_) = named(&fields) {
        options["fields"] = named;
    }
    if job.out.exists() && !job.force {
        let made = Gene::open(&job.out).ok().and_then(|g| g.manifest().extra.get("selected").cloned());
        if made.as_ref() == Some(&options) {
            ui.say(&format!(
                "`{}` is there already, made from the same inputs and options",
                job.out.display()
            ));
            return Ok(());
        }
        return Err(Failure::usage(
            format!("output `{}` exists", job.out.display()),
            "use another path, or `--force` to replace it",
        ));
    }
    let mut shelf = Shelf::default();
    let slot = shelf.open(&model)?;
    let refusal = chat.refusal_tokens(&openings)?;
    let attachments = GeneAttachments::new(&gene)?;
    let found =
        scores(&shelf.frozen(&slot), &attachments, &harmful_rows, &benign_rows, (&refusal, chat.end()))?;
    let kept = choose(&found, score, keep)?;
    let entry = |s: &LayerScore| {
        let all =
            serde_json::json!({ "price": s.price, "insertion": s.insertion, "activation": s.activation });
        LayerEntry {
            layer: s.layer,
            score: Some(s.get(score)),
            selected: kept.contains(&s.layer),
            extra: [("scores".to_string(), all)].into_iter().collect(),
        }
    };
    let layers: Vec<LayerEntry> = found.iter().map(entry).collect();
    let extra = [("selected".to_string(), options)].into_iter().collect();
    gene::write_selected(&job.out, job.force, &gene, layers, extra)?;
    if job.json {
        let value = serde_json::json!({ "schema": 1, "score": score, "kept": kept, "layers": found });
        ui.data(&value.to_string());
    } else {
        chart(&found, score, &kept, ui);
    }
    ui.say(&format!("wrote `{}`: {} of {} layers", job.out.display(), kept.len(), found.len()));
    Ok(())
}

/// A bar for each layer, scaled to the largest; a negative one is drawn with dashes.
fn chart(found: &[LayerScore], score: Score, kept: &[u32], ui: &Ui) {
    let most = found.iter().map(|s| s.get(score).abs()).fold(f64::MIN_POSITIVE, f64::max);
    ui.data(&format!("{:>5}  {:>11}  {:>11}  {:>11}", "layer", "price", "insertion", "activation"));
    for s in found {
        let value = s.get(score);
        let length = (value.abs() / most * BAR as f64).round() as usize;
        let bar = if value < 0.0 { "-" } else { "█" }.repeat(length);
        let mark = if kept.contains(&s.layer) { "*" } else { " " };
        ui.data(&format!(
            "{:>4}{mark}  {:>11.4}  {:>11.4}  {:>11.4}  {bar}",
            s.layer, s.price, s.insertion, s.activation
        ));
    }
}
