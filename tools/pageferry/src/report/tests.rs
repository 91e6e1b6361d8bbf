//! The page is made from runs that never happened: shapes a real migration has, in figures easy to check.

use mover::report::{Event, Phase, Sample, Summary};
use mover::units::{f64_of, u64_of_f64};

use super::*;
use crate::results::Figures;

/// A run of `total` ms that stops at `stop`, runs again 40 ms later, and then drains.
fn run(mode: &str, stop: f64, total: f64, disk: bool, verify: f64) -> Run {
    let mut events = vec![
        Event::Phase { at_ms: 0.0, phase: Phase::Connect },
        Event::Phase { at_ms: 20.0, phase: Phase::Rounds },
    ];
    let wall = total + verify;
    let mut at_ms = 0.0;
    while at_ms < wall {
        let done = at_ms / wall;
        let wave = 1.0 + 0.1 * (at_ms / 170.0).sin();
        let drain = at_ms > stop + 40.0 + verify;
        let standing = at_ms > stop && !drain;
        events.push(Event::Sample(Sample {
            at_ms,
            round: 1 + u32::from(at_ms > stop * 0.8),
            pages_left: if drain { 0 } else { u64_of_f64(262_144.0 * (1.0 - at_ms / stop).max(0.01)) },
            link_bytes: u64_of_f64(done * 1e9),
            disk_bytes: if disk { u64_of_f64(done * 6e8) } else { 0 },
            link_rate: if drain || standing { 3e5 } else { 117e6 * wave },
            disk_rate: if disk && !standing { 310e6 * wave } else { 0.0 },
            outstanding: if disk { u64_of_f64(90_000.0 * (done * 3.1).sin().max(0.0)) } else { 0 },
            restart_in_ms: Some(stop - at_ms),
            paused: standing,
            ..Sample::default()
        }));
        at_ms += 100.0;
    }
    let mut phase = |at_ms, phase| events.push(Event::Phase { at_ms, phase });
    phase(stop, Phase::Stop);
    phase(stop + 30.0, Phase::Verify);
    phase(stop + 30.0 + verify, Phase::Commit);
    phase(stop + 40.0 + verify, Phase::Drain);
    phase(wall, Phase::Done);
    let summary = Summary {
        mode: mode.to_owned(),
        workload: "remote desktop <1>".to_owned(),
        guest_bytes: 1 << 30,
        total_ms: total,
        downtime_ms: 40.0,
        restart_ms: stop + 40.0,
        rounds: 4,
        pages_zero: 52_000,
        pages_data: 210_000,
        link_bytes: u64_of_f64(total * 117_000.0),
        disk_bytes: if disk { 530 << 20 } else { 0 },
        pages_lazy: if disk { 41_000 } else { 0 },
        verified_pages: 262_144,
        lanes: 2,
        send_path: "copy".to_owned(),
        load_path: if disk { "staged" } else { "none" }.to_owned(),
        ..Summary::default()
    };
    Run { result: Figures { summary, full_speed_ms: Some(f64_of(180)), fared: None }, events, watched: true }
}

fn report() -> Report {
    Report {
        workload: "remote desktop <1>".to_owned(),
        guest_bytes: 1 << 30,
        command: "pageferry demo --link 1gbit --report report.html".to_owned(),
        machine: vec![
            ("Machine".to_owned(), "2 processors, 23 GiB".to_owned()),
            ("Link".to_owned(), "1gbit, shaped".to_owned()),
        ],
        runs: vec![
            run("stock", 9_600.0, 9_650.0, false, 300.0),
            run("plain", 7_400.0, 7_450.0, false, 300.0),
            run("refer", 3_900.0, 3_950.0, true, 300.0),
            run("lazy", 2_700.0, 3_600.0, true, 300.0),
        ],
    }
}

#[test]
fn the_page_stands_alone_and_says_everything() {
    let page = html(&report()).expect("a page in memory");
    // The only address in it is a name: SVG's name space.
    let addresses = page.replace("http://www.w3.org/2000/svg", "");
    for outside in ["http:", "https:", "<script", "src=", "@import", "url("] {
        assert!(!addresses.contains(outside), "{outside}");
    }
    assert_eq!(page.matches("<svg").count(), 4);
    assert_eq!(page.matches("<figure>").count(), 4);
    for text in ["9.65 s", "3.60 s", "530 MiB", "1gbit, shaped", "none differed", "downtime 40.0 ms"] {
        assert!(page.contains(text), "{text}");
    }
    assert!(page.contains("remote desktop &lt;1&gt;") && !page.contains("desktop <1>"), "names are escaped");
    // Every colour drawn has one in the style sheet.
    for ink in page.split("fill=\"#").skip(1).chain(page.split("stroke=\"#").skip(1)) {
        let colour = ink.get(..6).unwrap_or_default();
        assert!(page.contains(&format!("=\"#{colour}\"] {{")), "no style for #{colour}");
    }
    // `PAGEFERRY_KEEP_REPORT=FILE cargo nextest run -p pageferry report` leaves it to be looked at.
    if let Some(path) = std::env::var_os("PAGEFERRY_KEEP_REPORT") {
        std::fs::write(path, &page).expect("the page can be written");
    }
}

#[test]
fn a_wrong_page_is_not_hidden() {
    let mut report = report();
    report.runs[2].result.summary.mismatched_pages = 3;
    let page = html(&report).expect("a page in memory");
    assert!(page.contains("3 DIFFERED") && !page.contains("none differed"));
}
