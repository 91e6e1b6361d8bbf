//! (under construction in this change)
