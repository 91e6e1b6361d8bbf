//! What happens in a migration, in words.

use mover::report::{Event, Phase, Sample};

use crate::units::{show_count, show_ms, show_rate};

/// A phase.
pub(crate) fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Connect => "connecting",
        Phase::Arm => "arming the dirty log",
        Phase::Rounds => "copying while the guest runs",
        Phase::Stop => "guest paused, last pages under way",
        Phase::Verify => "verifying every page",
        Phase::Commit => "handing the guest over",
        Phase::Drain => "guest runs on the target, loading the rest",
        Phase::Done => "done",
    }
}

/// An event in a line; samples are not worth one.
pub(crate) fn event(event: &Event) -> Option<String> {
    match event {
        Event::Phase { at_ms, phase: which } => Some(format!("{:>9}  {}", show_ms(*at_ms), phase(*which))),
        Event::Round { at_ms, round, pages } => {
            Some(format!("{:>9}  round {round}: {} pages", show_ms(*at_ms), show_count(*pages)))
        }
        Event::Notice { at_ms, text } => Some(format!("{:>9}  {text}", show_ms(*at_ms))),
        Event::Sample(_) => None,
    }
}

/// A sample: what is left to do, and how it goes.
pub(crate) fn sample(sample: &Sample, during: Option<Phase>) -> (String, String) {
    let above = match during {
        Some(Phase::Drain) => format!("guest runs, {} pages to come", show_count(sample.outstanding)),
        Some(Phase::Rounds) | None => {
            format!("round {}, {} pages left", sample.round, show_count(sample.pages_left))
        }
        Some(other) => phase(other).to_owned(),
    };
    let mut below = vec![format!("link {}", show_rate(sample.link_rate))];
    if sample.disk_bytes > 0 {
        below.push(format!("disk {}", show_rate(sample.disk_rate)));
    }
    if sample.outstanding > 0 && during != Some(Phase::Drain) {
        below.push(format!("{} pages at the disk", show_count(sample.outstanding)));
    }
    match sample.restart_in_ms {
        _ if sample.paused => below.push("guest paused".to_owned()),
        Some(ms) if during != Some(Phase::Drain) => below.push(format!("restart in {}", show_ms(ms))),
        _ => {}
    }
    (above, below.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_reads_as_its_phase_asks() {
        let seen = Sample {
            round: 2,
            pages_left: 41_230,
            link_rate: 1e8,
            disk_rate: 3e8,
            disk_bytes: 1,
            outstanding: 1200,
            restart_in_ms: Some(230.0),
            ..Sample::default()
        };
        let (above, below) = sample(&seen, Some(Phase::Rounds));
        assert_eq!(above, "round 2, 41\u{202f}230 pages left");
        assert_eq!(
            below,
            "link 95.4 MiB/s, disk 286 MiB/s, 1\u{202f}200 pages at the disk, restart in 230 ms"
        );
        let (above, below) = sample(&seen, Some(Phase::Drain));
        assert_eq!(above, "guest runs, 1\u{202f}200 pages to come");
        assert!(!below.contains("restart"), "{below}");
        let (_, below) = sample(&Sample { paused: true, ..seen }, Some(Phase::Stop));
        assert!(below.ends_with("guest paused"), "{below}");
    }
}
