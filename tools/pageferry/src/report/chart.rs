//! The timeline of one migration as an SVG: rates above, pages below, the time the guest stood still shaded in both.
//!
//! Colours are those of [`Ink`]; the page's style sheet finds the elements by them and puts in what suits a light or a
//! dark screen.

use std::ops::Range;

use mover::report::{Event, Phase, Sample};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::results::{Run, at_ms, mib};

/// What is drawn in which colour.
pub(crate) struct Ink;

impl Ink {
    /// Text.
    pub(crate) const TEXT: RGBColor = RGBColor(1, 1, 1);
    /// Axes and grid.
    pub(crate) const GRID: RGBColor = RGBColor(2, 2, 2);
    /// Link rate.
    pub(crate) const LINK: RGBColor = RGBColor(3, 3, 3);
    /// Disk rate.
    pub(crate) const DISK: RGBColor = RGBColor(4, 4, 4);
    /// Dirty pages.
    pub(crate) const DIRTY: RGBColor = RGBColor(5, 5, 5);
    /// Outstanding pages.
    pub(crate) const OUTSTANDING: RGBColor = RGBColor(6, 6, 6);
    /// Downtime.
    pub(crate) const DOWNTIME: RGBColor = RGBColor(7, 7, 7);
    /// Verification, while the guest stands still for it.
    pub(crate) const VERIFY: RGBColor = RGBColor(8, 8, 8);
}

/// Drawn size; the page scales it.
const SIZE: (u32, u32) = (960, 380);
/// Where the upper panel ends.
const SPLIT: u32 = 190;

/// Ends of the axes, the same for all runs of a report, so that they can be compared by eye.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    /// Seconds.
    pub(crate) seconds: f64,
    /// MiB a second.
    pub(crate) rate: f64,
    /// Pages.
    pub(crate) pages: f64,
}

impl Scale {
    /// One that holds all of them.
    pub(crate) fn of(runs: &[Run]) -> Self {
        let most = |value: &dyn Fn(&Sample) -> f64| {
            runs.iter().flat_map(|run| samples(&run.events)).map(value).fold(1.0, f64::max) * 1.08
        };
        Self {
            seconds: runs.iter().map(crate::results::wall_ms).fold(1.0, f64::max) / 1e3 * 1.01,
            rate: most(&|s| mib(s.link_rate.max(s.disk_rate))),
            pages: most(&|s| mover::units::f64_of(s.pages_left.max(s.outstanding))),
        }
    }
}

fn samples(events: &[Event]) -> impl Iterator<Item = &Sample> {
    events.iter().filter_map(|event| match event {
        Event::Sample(sample) => Some(sample),
        _ => None,
    })
}

/// When a phase begins, in seconds.
fn begin(events: &[Event], wanted: Phase) -> Option<f64> {
    events
        .iter()
        .find(|e| matches!(e, Event::Phase { phase, .. } if *phase == wanted))
        .map(|e| at_ms(e) / 1e3)
}

/// When pages were verified, in seconds; empty if they were not.
fn verification(events: &[Event]) -> Range<f64> {
    match (begin(events, Phase::Verify), begin(events, Phase::Commit)) {
        (Some(verify), Some(commit)) if verify < commit => verify..commit,
        _ => 0.0..0.0,
    }
}

/// The spans in which the guest ran on neither end, each with its colour.
fn standstill(events: &[Event]) -> Vec<(Range<f64>, RGBColor)> {
    let Some(stop) = begin(events, Phase::Stop) else { return Vec::new() };
    let end = events.iter().map(at_ms).fold(0.0, f64::max) / 1e3;
    let runs_again = begin(events, Phase::Drain).or_else(|| begin(events, Phase::Done)).unwrap_or(end);
    let verify = verification(events);
    if verify.is_empty() {
        return vec![(stop..runs_again, Ink::DOWNTIME)];
    }
    vec![
        (stop..verify.start, Ink::DOWNTIME),
        (verify.clone(), Ink::VERIFY),
        (verify.end..runs_again, Ink::DOWNTIME),
    ]
}

/// Draws `run`. The error is plotters', which has none for a drawing into memory.
pub(crate) fn timeline(run: &Run, scale: Scale) -> Result<String, String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let (above, below) = area.split_vertically(SPLIT);
        let rates: [Series; 2] = [
            Series { ink: Ink::LINK, value: |s| mib(s.link_rate) },
            Series { ink: Ink::DISK, value: |s| mib(s.disk_rate) },
        ];
        let pages: [Series; 2] = [
            Series { ink: Ink::DIRTY, value: |s| mover::units::f64_of(s.pages_left) },
            Series { ink: Ink::OUTSTANDING, value: |s| mover::units::f64_of(s.outstanding) },
        ];
        panel(&above, run, &rates, scale.seconds, scale.rate, Labels { y: "MiB/s", x: None })?;
        let x = Some("seconds since the migration began");
        panel(&below, run, &pages, scale.seconds, scale.pages, Labels { y: "pages", x })?;
        area.present().map_err(|error| error.to_string())?;
    }
    Ok(svg)
}

/// A line of a panel.
struct Series {
    ink: RGBColor,
    value: fn(&Sample) -> f64,
}

struct Labels {
    y: &'static str,
    x: Option<&'static str>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn panel(
    area: &Area<'_>,
    run: &Run,
    series: &[Series],
    seconds: f64,
    most: f64,
    labels: Labels,
) -> Result<(), String> {
    let bottom = if labels.x.is_some() { 44 } else { 24 };
    let mut chart = ChartBuilder::on(area)
        .margin_top(20)
        .margin_right(14)
        .set_label_area_size(LabelAreaPosition::Left, 62)
        .set_label_area_size(LabelAreaPosition::Bottom, bottom)
        .build_cartesian_2d(0.0..seconds, 0.0..most)
        .map_err(|error| error.to_string())?;
    shade(&mut chart, run, most)?;
    let text = ("sans-serif", 13).into_font().color(&Ink::TEXT);
    let mut mesh = chart.configure_mesh();
    mesh.disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(Ink::GRID.stroke_width(1))
        .axis_style(Ink::GRID.stroke_width(1))
        .label_style(text.clone())
        .y_labels(4)
        .x_labels(10)
        .y_label_formatter(&|value| short(*value))
        .x_label_formatter(&|value| short(*value));
    if let Some(x) = labels.x {
        mesh.x_desc(x).axis_desc_style(text.clone());
    }
    mesh.draw().map_err(|error| error.to_string())?;
    let verifying = verification(&run.events);
    for line in series {
        // While pages are verified, those left are the ones to verify, which are not dirty.
        let value = |s: &Sample| {
            let counts = line.ink != Ink::DIRTY || !verifying.contains(&(s.at_ms / 1e3));
            if counts { (line.value)(s) } else { 0.0 }
        };
        let points: Vec<_> = samples(&run.events).map(|s| (s.at_ms / 1e3, value(s))).collect();
        if points.iter().all(|(_, value)| *value == 0.0) {
            continue;
        }
        let drawn = AreaSeries::new(points, 0.0, line.ink.mix(0.14)).border_style(line.ink.stroke_width(2));
        chart.draw_series(drawn).map_err(|error| error.to_string())?;
    }
    area.draw_text(labels.y, &text, (8, 2)).map_err(|error| error.to_string())
}

/// The time the guest stood still. A short one is drawn two pixels wide at least, or nobody would see it.
fn shade(chart: &mut Chart<'_, '_>, run: &Run, most: f64) -> Result<(), String> {
    let (pixels, _) = chart.plotting_area().dim_in_pixel();
    let least = 2.0 * chart.x_range().end / f64::from(pixels.max(1));
    let spans = standstill(&run.events).into_iter().map(|(span, ink)| {
        let end = span.end.max(span.start + least);
        Rectangle::new([(span.start, 0.0), (end, most)], ink.mix(0.35).filled())
    });
    chart.draw_series(spans).map(drop).map_err(|error| error.to_string())
}

/// A number for an axis: "0", "2.5", "800", "120 k", "1.5 M".
fn short(value: f64) -> String {
    let plain = |value: f64| {
        let text = if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") };
        text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
    };
    match value {
        v if v >= 1e6 => format!("{} M", plain(v / 1e6)),
        v if v >= 1e4 => format!("{} k", plain(v / 1e3)),
        v => plain(v),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axis_numbers_are_short() {
        for (value, text) in
            [(0.0, "0"), (2.5, "2.5"), (3.0, "3"), (800.0, "800"), (120_000.0, "120 k"), (1.5e6, "1.5 M")]
        {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn the_guest_stands_still_from_stop_to_drain_apart_from_verification() {
        let phase = |at_ms: f64, phase| Event::Phase { at_ms, phase };
        let plain = [phase(0.0, Phase::Connect), phase(900.0, Phase::Stop), phase(950.0, Phase::Done)];
        assert_eq!(standstill(&plain), [(0.9..0.95, Ink::DOWNTIME)]);
        let verified = [
            phase(900.0, Phase::Stop),
            phase(950.0, Phase::Verify),
            phase(1450.0, Phase::Commit),
            phase(1460.0, Phase::Drain),
            phase(2000.0, Phase::Done),
        ];
        let spans = standstill(&verified);
        assert_eq!(spans.len(), 3);
        assert_eq!(spans[1], (0.95..1.45, Ink::VERIFY));
        assert_eq!(spans[2].0.end, 1.46);
        assert!(standstill(&[phase(0.0, Phase::Connect)]).is_empty());
    }
}
