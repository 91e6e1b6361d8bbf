//! A domain as its toolstack sees it: what a save reads of it and a restore makes of it.
//!
//! [`Source`] and [`Target`] are what the phases of [`crate::save`] and [`crate::restore`] know; [`HvmSource`] and
//! [`HvmTarget`] are HVM and PVH guests, [`PvSource`] and [`PvTarget`] PV ones. Each owns its handle to the hypervisor, and everything it maps goes
//! when it is dropped.
#![forbid(unsafe_code)]

mod common;
mod cost;
mod error;
mod grants;
mod hvm;
mod lanes;
mod orphan;
mod pages;
mod paging;
mod populate;
mod pv;
mod requests;
mod state;
mod traits;

pub use common::Domain;
pub use cost::PagingCost;
pub use error::DomainError;
pub use hvm::{HvmSource, HvmTarget};
pub(crate) use orphan::{Orphaned, Watch};
pub use pages::BATCH_PAGES;
pub use paging::Guarded;
pub use pv::{PvSource, PvTarget};
pub use state::{FinalState, Frames, KindState, StaticState, Wiring};
pub(crate) use traits::difference;
pub use traits::{Absent, Batch, Held, Lazy, Life, LogRead, Source, Target};
