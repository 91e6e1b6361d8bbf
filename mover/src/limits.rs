//! Every named limit of the engine, in one place. Whatever comes from outside is held against these before it is
//! used, and nothing on the hot path grows past them.

/// Lanes of one migration.
pub const LANES_MAX: usize = 16;
/// Disks of one guest that pages may be referenced on.
pub const DISKS_MAX: usize = 16;
/// Images in one chain of clones, the raw one at the bottom counted.
pub const CHAIN_IMAGES_MAX: usize = 16;
/// Bytes of a clone's header that are looked at: those who write qcow2 put everything that names other files into far less.
pub const CLONE_HEADER_BYTES_MAX: usize = 64 * 1024;
/// Bytes of the name that a clone has for another image.
pub const IMAGE_NAME_BYTES_MAX: usize = 1023;
/// Pages in one frame of page data: 1 MiB of payload, where loopback and large NICs stop gaining from more.
pub const PAGES_PER_FRAME: usize = 256;
/// Runs of pages in one frame that says "these are zero".
pub const ZERO_RUNS_PER_FRAME: usize = 256;
/// References in one frame.
pub const REFERENCES_PER_FRAME: usize = 256;
/// Digests in one frame of the verification pass.
pub const DIGESTS_PER_FRAME: usize = 1024;
/// Bytes of one control message.
pub const CONTROL_MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Bytes of the guest's state outside memory (vCPUs, devices), all chunks together.
pub const STATE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Pages a guest may have: 1 TiB. Pfns on the wire are held against the guest's own size besides.
pub const GUEST_PAGES_MAX: u64 = 1 << 28;
/// Bytes of one read from a disk into a staging slot.
pub const READ_BYTES_MAX: usize = 1024 * 1024;
/// Reads in flight to the disks in the drain and the rounds.
pub const READ_DEPTH: usize = 16;
/// Refetches named in one control message.
pub const REFETCHES_PER_MESSAGE: usize = 1024;
/// Connections that are being greeted at once: a socket and 64 bytes each until they have shown the secret.
pub const GREETINGS_MAX: usize = 64;
/// Of those, from one address: all lanes of a migration at once, and the control connection.
pub const GREETINGS_PER_ADDRESS_MAX: usize = 24;
