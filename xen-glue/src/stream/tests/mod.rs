//! The codec against itself, against bytes written by hand, and against whatever else may come.

mod round_trip;
mod samples;
