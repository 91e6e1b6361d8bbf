//! The codec against itself, against bytes written by hand, and against whatever else may come.

mod faults;
pub(crate) mod hostile;
mod properties;
mod round_trip;
pub(crate) mod samples;
mod xen_utils;
