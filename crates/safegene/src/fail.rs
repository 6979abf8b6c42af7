//! Errors of all crates as one: exit code, message, causes, hint.

use checkpoint::CheckpointError;
use std::error::Error;
use std::io::ErrorKind;

/// Exit codes that job schedulers rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// The answer is no.
    No = 1,
    /// The call is wrong.
    Usage = 2,
    /// An input is invalid: do not retry.
    Input = 3,
    /// Temporary: retry.
    Temporary = 75,
}

/// What is printed before the program ends.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
    pub(crate) causes: Vec<String>,
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { code: Code::Usage, message: message.into(), causes: Vec::new(), hint: Some(hint.into()) }
    }

    /// Puts the intent before the error: `cannot extract from …`.
    pub(crate) fn context(mut self, intent: impl Into<String>) -> Self {
        let message = std::mem::replace(&mut self.message, intent.into());
        self.causes.insert(0, message);
        self
    }
}

fn of(error: &dyn Error, code: Code, hint: Option<String>) -> Failure {
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    Failure { code, message: error.to_string(), causes, hint }
}

fn io_code(kind: ErrorKind, reading: bool) -> Code {
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::Interrupted => Code::Temporary,
        ErrorKind::NotFound | ErrorKind::NotADirectory if reading => Code::Input,
        ErrorKind::PermissionDenied
        | ErrorKind::ReadOnlyFilesystem
        | ErrorKind::NotFound
        | ErrorKind::NotADirectory => Code::Usage,
        _ if reading => Code::Input,
        _ => Code::Temporary,
    }
}

fn checkpoint_code(e: &CheckpointError) -> Code {
    match e {
        CheckpointError::OutputExists { .. } | CheckpointError::OutputForeign { .. } => Code::Usage,
        CheckpointError::OutputBusy { .. } => Code::Temporary,
        CheckpointError::Io { action, source, .. } => {
            io_code(source.kind(), matches!(*action, "read" | "open" | "list"))
        }
        _ => Code::Input,
    }
}

impl From<CheckpointError> for Failure {
    fn from(e: CheckpointError) -> Self {
        of(&e, checkpoint_code(&e), e.hint())
    }
}

/// The code of an error that wraps others: that of the checkpoint error inside, else `otherwise`.
fn inner_code(error: &(dyn Error + 'static), otherwise: Code) -> Code {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(c) = e.downcast_ref::<CheckpointError>() {
            return checkpoint_code(c);
        }
        next = e.source();
    }
    otherwise
}

impl From<evaluate::DataError> for Failure {
    fn from(e: evaluate::DataError) -> Self {
        of(&e, Code::Input, e.hint())
    }
}

impl From<transformer::ModelError> for Failure {
    fn from(e: transformer::ModelError) -> Self {
        let code = match &e {
            transformer::ModelError::Checkpoint(c) => checkpoint_code(c),
            _ => Code::Input,
        };
        of(&e, code, e.hint())
    }
}

impl From<lab::LabError> for Failure {
    fn from(e: lab::LabError) -> Self {
        let code = match &e {
            lab::LabError::Unsound { .. } => Code::No,
            lab::LabError::UnknownFamily(_) => Code::Usage,
            lab::LabError::Checkpoint(c) => checkpoint_code(c),
            _ => Code::Input,
        };
        of(&e, code, None)
    }
}

impl From<gene::GeneError> for Failure {
    fn from(e: gene::GeneError) -> Self {
        let code = gene_code(&e);
        of(&e, code, e.hint())
    }
}

fn gene_code(e: &gene::GeneError) -> Code {
    match e {
        gene::GeneError::Checkpoint(c) => checkpoint_code(c),
        gene::GeneError::Io { action, source, .. } => io_code(source.kind(), *action == "read"),
        gene::GeneError::NegativeCoefficient { .. } => Code::Usage,
        e => inner_code(e, Code::Input),
    }
}

impl From<stream::StreamError> for Failure {
    fn from(e: stream::StreamError) -> Self {
        let code = match &e {
            stream::StreamError::Checkpoint(c) => checkpoint_code(c),
            stream::StreamError::Gene(g) => gene_code(g),
            stream::StreamError::OutsideCoefficient { .. }
            | stream::StreamError::NoShares
            | stream::StreamError::NoWork { .. } => Code::Usage,
            stream::StreamError::Interrupted { .. } | stream::StreamError::Incomplete { .. } => {
                Code::Temporary
            }
            stream::StreamError::OtherWork { .. } => Code::Usage,
            e if e.is_of_device() => Code::Temporary,
            e => inner_code(e, Code::Input),
        };
        of(&e, code, e.hint())
    }
}

impl From<recover::RecoverError> for Failure {
    fn from(e: recover::RecoverError) -> Self {
        use recover::RecoverError as E;
        let code = match &e {
            E::UnknownMethod { .. }
            | E::Missing { .. }
            | E::Option { .. }
            | E::UnusedOption { .. }
            | E::NoAdapter { .. }
            | E::Memory { .. } => Code::Usage,
            E::Interrupted => Code::Temporary,
            E::Gene(g) => gene_code(g),
            e if e.is_of_device() => Code::Temporary,
            E::Checkpoint(c) => checkpoint_code(c),
            e => inner_code(e, Code::Input),
        };
        of(&e, code, e.hint())
    }
}

impl From<distill::CalibrationError> for Failure {
    fn from(e: distill::CalibrationError) -> Self {
        let code = match &e {
            distill::CalibrationError::Limit { .. } => Code::Usage,
            e => inner_code(e, Code::Input),
        };
        of(&e, code, e.hint())
    }
}

impl From<distill::distillation::DistillError> for Failure {
    fn from(e: distill::distillation::DistillError) -> Self {
        use distill::distillation::DistillError;
        let code = match &e {
            DistillError::Setting { .. } => Code::Usage,
            DistillError::Stopped(_) => Code::Temporary,
            e => inner_code(e, Code::Input),
        };
        of(&e, code, None)
    }
}

impl From<compare::CompareError> for Failure {
    fn from(e: compare::CompareError) -> Self {
        use compare::CompareError;
        let hint = e.hint();
        let code = match &e {
            CompareError::Stopped => Code::Temporary,
            CompareError::OtherWork { .. } | CompareError::OtherLab { .. } => Code::Usage,
            CompareError::Gate { .. } => Code::No,
            CompareError::Lab(lab::LabError::Unsound { .. }) => Code::No,
            e => inner_code(e, Code::Input),
        };
        of(&e, code, hint)
    }
}

impl From<distill::select::SelectError> for Failure {
    fn from(e: distill::select::SelectError) -> Self {
        use distill::select::SelectError;
        let code = match &e {
            SelectError::Keep { .. } => Code::Usage,
            SelectError::NothingPositive => Code::No,
            e => inner_code(e, Code::Input),
        };
        of(&e, code, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn full_disk_is_temporary_and_a_missing_input_is_not() {
        let io = |action: &'static str, kind: ErrorKind| CheckpointError::Io {
            action,
            path: "x".into(),
            source: io::Error::from(kind),
        };
        assert_eq!(checkpoint_code(&io("write", ErrorKind::StorageFull)), Code::Temporary);
        assert_eq!(checkpoint_code(&io("read", ErrorKind::NotFound)), Code::Input);
        assert_eq!(checkpoint_code(&io("create", ErrorKind::PermissionDenied)), Code::Usage);
        // Wrapped twice, the code is still that of the innermost.
        let wrapped =
            stream::StreamError::Gene(gene::GeneError::Checkpoint(io("write", ErrorKind::StorageFull)));
        assert_eq!(Failure::from(wrapped).code, Code::Temporary);
    }
}
