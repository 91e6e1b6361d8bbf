//! Where this program keeps what outlives a command.

pub(crate) use mover::state::{indexes as index_dir, records as records_dir};
