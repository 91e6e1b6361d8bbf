//! What the user sees while guests move: two lines that change on a terminal, a line now and then elsewhere, nothing
//! with `--quiet`.

use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use mover::report::{Event, Mode, Phase, Sample};

use crate::console::Console;
use crate::results::Figures;
use crate::units::{show_bytes, show_count, show_ms};
use crate::words;

/// Where there is no terminal, a sample is printed so often.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(120);

/// Progress of a whole demonstration.
pub(super) struct Progress {
    console: Console,
    screen: Option<Screen>,
}

/// The two lines.
struct Screen {
    all: MultiProgress,
    bar: ProgressBar,
    below: ProgressBar,
}

impl Progress {
    /// As the console allows.
    pub(super) fn new(console: &Console) -> Self {
        Self { console: *console, screen: console.draws().then(Screen::new) }
    }

    /// Something about the whole, to stay on the screen.
    pub(super) fn say(&self, text: &str) {
        match &self.screen {
            // It fails where standard error is closed: there is nobody to tell.
            Some(screen) => drop(screen.all.println(text)),
            None => self.console.note(text),
        }
    }

    /// What is being waited for outside of a migration.
    pub(super) fn waiting(&self, text: &str) {
        match &self.screen {
            Some(screen) => screen.wait(text),
            None => self.console.note(text),
        }
    }

    /// A migration begins.
    pub(super) fn begin(&self, mode: Mode) -> Migration<'_> {
        if let Some(screen) = &self.screen {
            screen.begin(mode);
        }
        Migration { progress: self, mode, phase: None, most: 1, said: None }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(screen) = &self.screen {
            screen.clear();
        }
    }
}

impl Screen {
    fn new() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        let bar = all.add(ProgressBar::hidden());
        let below = all.add(ProgressBar::hidden());
        let screen = Self { all, bar, below };
        screen.clear();
        screen
    }
    fn style(template: &str) -> ProgressStyle {
        let style = ProgressStyle::with_template(template);
        style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ ")
    }
    fn begin(&self, mode: Mode) {
        self.bar.set_style(Self::style("{prefix:>7} {bar:28} {wide_msg}"));
        self.below.set_style(Self::style("        {wide_msg}"));
        self.bar.disable_steady_tick();
        self.bar.set_prefix(mode.name());
        self.bar.set_position(0);
        self.bar.set_message("connecting");
        self.below.set_message("");
    }
    fn wait(&self, text: &str) {
        self.bar.set_style(Self::style("{spinner} {wide_msg}"));
        self.below.set_style(Self::style("{wide_msg}"));
        self.bar.set_message(text.to_owned());
        self.below.set_message("");
        self.bar.enable_steady_tick(TICK);
    }
    fn clear(&self) {
        self.bar.disable_steady_tick();
        self.bar.set_style(Self::style("{wide_msg}"));
        self.below.set_style(Self::style("{wide_msg}"));
        self.bar.set_message("");
        self.below.set_message("");
        // Fails where standard error is closed.
        drop(self.all.clear());
    }
}

/// Progress of one migration.
pub(super) struct Migration<'a> {
    progress: &'a Progress,
    mode: Mode,
    phase: Option<Phase>,
    /// Most pages there were to do at once: the bar's length.
    most: u64,
    said: Option<Instant>,
}

impl Migration<'_> {
    /// Takes what happened.
    pub(super) fn event(&mut self, event: &Event) {
        match event {
            Event::Phase { at_ms, phase } => {
                self.phase = Some(*phase);
                self.line(&format!("{} at {}", words::phase(*phase), show_ms(*at_ms)), "");
            }
            Event::Round { round, pages, .. } => {
                self.most = self.most.max(*pages);
                self.line(&format!("round {round}: {} pages", show_count(*pages)), "");
            }
            Event::Sample(sample) => self.sample(sample),
            Event::Notice { text, .. } => self.progress.say(&format!("{:>7} {text}", self.mode.name())),
        }
    }

    fn sample(&mut self, sample: &Sample) {
        let left = sample.pages_left + sample.outstanding;
        self.most = self.most.max(left);
        let (above, below) = words::sample(sample, self.phase);
        if let Some(screen) = &self.progress.screen {
            screen.bar.set_length(self.most);
            screen.bar.set_position(self.most - left);
            screen.bar.set_message(above);
            screen.below.set_message(below);
        } else if self.said.is_none_or(|said| said.elapsed() >= SAMPLE_EVERY) {
            self.said = Some(Instant::now());
            self.line(&above, &below);
        }
    }

    /// A line of its own, where there is no screen.
    fn line(&self, text: &str, more: &str) {
        if self.progress.screen.is_none() {
            let comma = if more.is_empty() { "" } else { ", " };
            self.progress.console.note(&format!("{:>7} {text}{comma}{more}", self.mode.name()));
        }
    }

    /// It has ended well.
    pub(super) fn end(self, figures: &Figures) {
        let summary = &figures.summary;
        let mut parts = vec![
            format!("{} in all", show_ms(summary.total_ms)),
            format!("{} down", show_ms(summary.downtime_ms)),
            format!("{} sent", show_bytes(summary.link_bytes)),
        ];
        if summary.disk_bytes > 0 {
            parts.push(format!("{} loaded", show_bytes(summary.disk_bytes)));
        }
        match (summary.verified_pages, summary.mismatched_pages) {
            (0, _) => {}
            (_, 0) => parts.push("verified".to_owned()),
            (n, wrong) => parts.push(format!("{} of {} pages WRONG", show_count(wrong), show_count(n))),
        }
        self.progress.say(&format!("{:>7} {}", self.mode.name(), parts.join(", ")));
    }
}
