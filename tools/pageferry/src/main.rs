//! Placeholder replaced in this same change.
fn main() {}
