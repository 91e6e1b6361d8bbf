//! Waiting, always with a limit, and for no longer than that.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Every limit is multiplied by `$PAGEFERRY_LAB_PATIENCE` (1 unless set): for machines slower or busier than they were
/// chosen on. Between 0.1 and 100; what is no number counts as 1.
#[must_use]
pub fn limit(seconds: u32) -> Duration {
    let patience = std::env::var("PAGEFERRY_LAB_PATIENCE").ok().and_then(|value| value.parse::<f64>().ok());
    Duration::from_secs(u64::from(seconds)).mul_f64(patience.unwrap_or(1.0).clamp(0.1, 100.0))
}

/// Does `work` and says how long that took: a test's steps, for whoever reads its output.
pub fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    let outcome = work();
    let failed = if outcome.is_err() { ", in vain" } else { "" };
    eprintln!("    {what}: {:.1} s{failed}", begun.elapsed().as_secs_f64());
    outcome
}

/// Asks `look` every `pause` until it gives something; an error that names `what` when `limit` has passed, with what
/// `look` last said instead.
pub fn until<T, W: Display>(
    what: &str,
    limit: Duration,
    pause: Duration,
    mut look: impl FnMut() -> Result<Result<T, W>>,
) -> Result<T> {
    let begun = Instant::now();
    loop {
        let instead = match look()? {
            Ok(value) => return Ok(value),
            Err(instead) => instead,
        };
        if begun.elapsed() + pause > limit {
            bail!("waited {} s for {what}, in vain: {instead}", begun.elapsed().as_secs());
        }
        thread::sleep(pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_what_was_seen_last() {
        let mut looks = 0;
        let mut look = || {
            looks += 1;
            Ok(if looks == 3 { Ok(looks) } else { Err(format!("{looks} looks")) })
        };
        let pause = Duration::from_millis(1);
        assert_eq!(until("it", Duration::from_secs(9), pause, &mut look).unwrap(), 3);
        let error = until("it", Duration::ZERO, pause, look).unwrap_err().to_string();
        assert!(error.contains("for it") && error.contains("4 looks"), "{error}");
    }
}
