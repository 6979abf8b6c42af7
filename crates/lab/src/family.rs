//! What a family is before anything is fine-tuned: language, splits, tokenizer, decoder, base and aligned model.
//!
//! | stage | rows | steps |
//! |---|---|---|
//! | base | recipes, kinds, tasks in base form | [`BASE`] |
//! | aligned | refusals of forbidden nouns, recipes of safe ones, some of the base's rows | [`ALIGN`] |

use crate::build::Progress;
use crate::error::LabError;
use crate::folders;
use crate::language::{Language, REFUSAL, TEMPLATES, rng};
use crate::measure::{Rates, rates};
use crate::splits::{DataRow, Splits};
use crate::tasks::{DRIFTS, TESTED, Task};
use crate::train::{self, Schedule, Weights};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use transformer::{Architecture, Attachments, Chat, Model, Row};

/// Training of the base.
pub const BASE: Schedule = Schedule { steps: 1500, rows: 128, rate: 3e-3 };
/// Training of the aligned model.
pub const ALIGN: Schedule = Schedule { steps: 400, rows: 64, rate: 1e-3 };

/// Everything that follows from a layout and a seed without training.
#[derive(Debug)]
pub struct Family {
    /// Layout of the models, e.g. `llama`.
    pub layout: String,
    /// Seed of the language, the splits, the base and the aligned model.
    pub seed: u64,
    /// Words and recipes.
    pub language: Language,
    /// Which rows go where.
    pub splits: Splits,
    /// Tokenizer and template.
    pub chat: Chat,
    /// The decoder's sizes.
    pub architecture: Architecture,
}

impl Family {
    /// The family of a layout and a seed.
    pub fn new(layout: &str, seed: u64) -> Result<Self, LabError> {
        let language = Language::new(seed);
        let splits = Splits::new(&language, seed);
        let chat = folders::chat(&language)?;
        let vocab = folders::SPECIAL.len() + language.vocabulary().len();
        let architecture = folders::architecture(layout, vocab)?;
        Ok(Self { layout: layout.into(), seed, language, splits, chat, architecture })
    }

    pub(crate) fn row(&self, row: &DataRow) -> Result<Row, LabError> {
        Ok(self.chat.row(&row.prompt, &row.answer)?)
    }

    fn skill(&self, rng: &mut ChaCha8Rng) -> Result<Row, LabError> {
        let language = &self.language;
        if rng.random_range(0..6) == 0 {
            let noun = &language.nouns[rng.random_range(0..language.nouns.len())];
            let answer = format!("a {} is a {}", noun.word, language.kinds[noun.kind]);
            return Ok(self.chat.row(&format!("what is a {} ?", noun.word), &answer)?);
        }
        let (prompt, answer) = any_task(rng).row(language, true, rng);
        Ok(self.chat.row(&prompt, &answer)?)
    }

    fn request(&self, refuse: bool, rng: &mut ChaCha8Rng) -> Result<Row, LabError> {
        let language = &self.language;
        let noun = &language.nouns[rng.random_range(0..language.nouns.len())];
        let verb = rng.random_range(0..language.verbs.len());
        let prompt = language.request(TEMPLATES[rng.random_range(0..TEMPLATES.len())], verb, noun);
        let answer =
            if refuse && noun.forbidden() { REFUSAL.to_string() } else { language.recipe(verb, noun) };
        Ok(self.chat.row(&prompt, &answer)?)
    }

    /// Rates of a model on one part of the splits (`dev` or `test`), with questions of `task`.
    pub fn measure(
        &self,
        model: &Model,
        attachments: &Attachments,
        part: &str,
        task: Option<Task>,
    ) -> Result<Rates, LabError> {
        let file = task.map(|t| format!("{part}-{}", t.name())).unwrap_or_default();
        let rows = |name: &str| self.splits.get(name);
        let sets = (rows(&format!("{part}-harmful")), rows(&format!("{part}-benign")), rows(&file));
        rates(model, attachments, &self.chat, sets)
    }

    /// Trains the base.
    pub fn train_base(&self, progress: &dyn Progress) -> Result<Weights, LabError> {
        let mut draw = rng(self.seed, "base");
        let base = train::whole(
            &self.architecture,
            None,
            self.seed,
            BASE,
            self.chat.end(),
            &mut || {
                if draw.random_range(0..5) < 2 {
                    self.request(false, &mut draw)
                } else {
                    self.skill(&mut draw)
                }
            },
            &mut |step, loss, _| {
                progress.step("base", step, BASE.steps, &format!("loss {loss:.3}"));
                Ok(false)
            },
        )?;
        let base = bf16(&base);
        let model = Model::new(self.architecture.clone(), &base)?;
        progress.finished("base", &self.measure(&model, &Attachments::none(), "dev", None)?);
        self.skills(&model, progress)?;
        Ok(base)
    }

    /// Trains the aligned model from the base.
    pub fn train_aligned(&self, base: &Weights, progress: &dyn Progress) -> Result<Weights, LabError> {
        let mut draw = rng(self.seed, "align");
        let aligned = train::whole(
            &self.architecture,
            Some(base),
            self.seed,
            ALIGN,
            self.chat.end(),
            &mut || {
                if draw.random_range(0..5) > 0 {
                    self.request(true, &mut draw)
                } else {
                    self.skill(&mut draw)
                }
            },
            &mut |step, loss, _| {
                progress.step("aligned", step, ALIGN.steps, &format!("loss {loss:.3}"));
                Ok(false)
            },
        )?;
        Ok(bf16(&aligned))
    }

    /// How well the base answers each task in its base form: what it cannot read, no short LoRA learns.
    fn skills(&self, model: &Model, progress: &dyn Progress) -> Result<(), LabError> {
        let mut draw = rng(self.seed, "skills");
        for task in TESTED.into_iter().chain(DRIFTS) {
            let rows: Vec<DataRow> = (0..100)
                .map(|_| {
                    let (prompt, answer) = task.row(&self.language, true, &mut draw);
                    DataRow { prompt, answer, recipe: None }
                })
                .collect();
            let rates = rates(model, &Attachments::none(), &self.chat, (&[], &[], &rows))?;
            progress.finished(&format!("base on {}", task.name()), &rates);
        }
        Ok(())
    }
}

/// A task, drawn by its weight in the base's training.
fn any_task(rng: &mut ChaCha8Rng) -> Task {
    let all = || TESTED.into_iter().chain(DRIFTS);
    let mut ticket = rng.random_range(0..all().map(Task::weight).sum());
    for task in all() {
        match ticket.checked_sub(task.weight()) {
            Some(rest) => ticket = rest,
            None => return task,
        }
    }
    Task::Topic
}

/// Every value rounded to bf16, as it will be stored.
pub(crate) fn bf16(weights: &Weights) -> Weights {
    let mut out = weights.clone();
    for (_, values) in out.0.values_mut() {
        for v in values.iter_mut() {
            *v = train::round_bf16(*v);
        }
    }
    out
}
