//! The decoder as a whole: gradients, batching, cache, attachments, templates.

mod chat;
mod decoder;
