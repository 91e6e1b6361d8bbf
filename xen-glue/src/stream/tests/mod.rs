//! The codec against itself, against bytes written by hand, and against whatever else may come.

mod faults;
mod hostile;
mod properties;
mod round_trip;
mod samples;
mod xen_utils;
