//! Progress on stderr, status lines on stdout, and the wish to stop.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use vmkeep::monitor::{Monitor, TaskId};

use super::output::{Output, printable};
use super::units::{duration, size};

/// Bars drawn a second on a terminal.
const BAR_FPS: f64 = 10.0;
/// JSON status lines a second.
const JSON_FPS: f64 = 1.0;
/// Lines a second where stderr is no terminal: one a minute.
const LINE_FPS: f64 = 1.0 / 60.0;

/// How progress is shown.
#[derive(Debug)]
enum Mode {
    Silent,
    Bars(MultiProgress),
    Lines { every: Duration },
    Json { every: Duration },
}

/// One running task.
#[derive(Debug)]
struct Task {
    name: String,
    total_bytes: u64,
    done_bytes: u64,
    bar: Option<ProgressBar>,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    tasks: BTreeMap<u64, Task>,
    /// Of tasks that are over.
    finished_bytes: u64,
    /// They are shown until a result is printed.
    finished_bars: Vec<ProgressBar>,
    last_report: Option<Instant>,
}

/// The program's [`Monitor`].
#[derive(Debug)]
pub struct Progress {
    mode: Mode,
    output: Output,
    started: Instant,
    cancelled: Arc<AtomicBool>,
    state: Mutex<State>,
}

/// A task in a status line.
#[derive(Debug, Serialize)]
struct TaskView<'a> {
    name: &'a str,
    bytes_done: u64,
    /// 0 where unknown.
    total_bytes: u64,
}

#[derive(Debug, Serialize)]
struct StatusView<'a> {
    message_type: &'static str,
    seconds_elapsed: u64,
    bytes_done: u64,
    total_bytes: u64,
    /// 0 to 1; absent where a total is unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    fraction_done: Option<f64>,
    tasks: Vec<TaskView<'a>>,
}

impl Progress {
    /// Creates a monitor; `fps` overrides how often it reports.
    pub fn new(output: &Output, fps: Option<f64>) -> Self {
        let every = |default: f64| Duration::from_secs_f64(1.0 / fps.unwrap_or(default).max(1e-6));
        let mode = if output.json {
            Mode::Json { every: every(JSON_FPS) }
        } else if output.quiet {
            Mode::Silent
        } else if std::io::stderr().is_terminal() {
            // the type holds whole frames a second; a terminal has no use for fewer than one
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let hertz = fps.unwrap_or(BAR_FPS).clamp(1.0, 60.0) as u8;
            Mode::Bars(MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(hertz)))
        } else {
            Mode::Lines { every: every(LINE_FPS) }
        };
        Self {
            mode,
            output: output.clone(),
            started: Instant::now(),
            cancelled: Arc::default(),
            state: Mutex::default(),
        }
    }

    /// Returns the flag that makes the work stop.
    pub fn cancelled(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancelled)
    }

    /// Takes the bars away, before the result is printed.
    pub fn clear(&self) {
        if let Mode::Bars(bars) = &self.mode {
            // a terminal that is gone needs no clearing
            let _ = bars.clear();
        }
    }

    /// Prints a result while other work goes on: bars that are full go away, the others come back behind it.
    pub fn print<T>(&self, print: impl FnOnce() -> T) -> T {
        let Mode::Bars(bars) = &self.mode else { return print() };
        for bar in std::mem::take(&mut self.state().finished_bars) {
            bar.finish_and_clear();
            bars.remove(&bar);
        }
        bars.suspend(print)
    }

    /// A thread that panicked while it counted leaves numbers that are still good enough to show.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn say(&self, text: &str) {
        let write = || {
            let _ = writeln!(std::io::stderr(), "{}", printable(text));
        };
        match &self.mode {
            Mode::Bars(bars) => bars.suspend(write),
            _ => write(),
        }
    }

    fn report_if_due(&self, state: &mut State) {
        let every = match &self.mode {
            Mode::Silent | Mode::Bars(_) => return,
            Mode::Lines { every } | Mode::Json { every } => *every,
        };
        let last = state.last_report.unwrap_or(self.started);
        let first_json = state.last_report.is_none() && matches!(self.mode, Mode::Json { .. });
        if !first_json && last.elapsed() < every {
            return;
        }
        state.last_report = Some(Instant::now());
        match &self.mode {
            Mode::Json { .. } => self.status_line(state),
            _ => self.text_line(state),
        }
    }

    fn status_line(&self, state: &State) {
        let running = |of: fn(&Task) -> u64| state.tasks.values().map(of).fold(0, u64::saturating_add);
        let total_bytes = running(|task| task.total_bytes).saturating_add(state.finished_bytes);
        let bytes_done = running(|task| task.done_bytes).saturating_add(state.finished_bytes);
        let known = total_bytes > 0 && state.tasks.values().all(|task| task.total_bytes > 0);
        let status = StatusView {
            message_type: "status",
            seconds_elapsed: self.started.elapsed().as_secs(),
            bytes_done,
            total_bytes,
            fraction_done: known.then(|| (bytes_done as f64 / total_bytes as f64).min(1.0)),
            tasks: state
                .tasks
                .values()
                .map(|task| TaskView {
                    name: &task.name,
                    bytes_done: task.done_bytes,
                    total_bytes: task.total_bytes,
                })
                .collect(),
        };
        // a reader that went away must not end a backup
        let _ = self.output.json_line(&status);
    }

    fn text_line(&self, state: &State) {
        let elapsed = self.started.elapsed();
        for task in state.tasks.values() {
            let done = size(task.done_bytes);
            let of = match task.total_bytes {
                0 => String::new(),
                total => format!(
                    " of {} ({:.0} %)",
                    size(total),
                    100.0 * (task.done_bytes as f64 / total as f64).min(1.0)
                ),
            };
            let elapsed = duration(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
            self.say(&format!("{}: {done}{of} after {elapsed}", task.name));
        }
    }
}

fn bar(bars: &MultiProgress, name: &str, total_bytes: u64) -> ProgressBar {
    let template = if total_bytes == 0 {
        "{prefix:16!} {spinner} {binary_bytes} {binary_bytes_per_sec}"
    } else {
        "{prefix:16!} [{bar:24}] {percent:>3}% {binary_bytes:>10} of {binary_total_bytes:<10} {binary_bytes_per_sec:>12} eta {eta}"
    };
    let bar = if total_bytes == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total_bytes) };
    // the templates are constants; a test draws them
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(printable(name).replace('\n', " "));
    bars.add(bar)
}

impl Monitor for Progress {
    fn start(&self, name: &str, total_bytes: u64) -> TaskId {
        let bar = match &self.mode {
            Mode::Bars(bars) => Some(bar(bars, name, total_bytes)),
            _ => None,
        };
        let mut state = self.state();
        let id = state.next_id;
        state.next_id = id.saturating_add(1);
        state.tasks.insert(id, Task { name: name.to_owned(), total_bytes, done_bytes: 0, bar });
        self.report_if_due(&mut state);
        TaskId(id)
    }

    fn advance(&self, task: TaskId, bytes: u64) {
        let mut state = self.state();
        if let Some(task) = state.tasks.get_mut(&task.0) {
            task.done_bytes = task.done_bytes.saturating_add(bytes);
            if let Some(bar) = &task.bar {
                bar.inc(bytes);
            }
        }
        self.report_if_due(&mut state);
    }

    fn finish(&self, task: TaskId) {
        let mut state = self.state();
        if let Some(task) = state.tasks.remove(&task.0) {
            state.finished_bytes = state.finished_bytes.saturating_add(task.done_bytes);
            if let Some(bar) = &task.bar {
                bar.finish();
            }
            state.finished_bars.extend(task.bar);
        }
    }

    fn warn(&self, message: &str) {
        self.say(&format!("warning: {message}"));
    }

    fn note(&self, message: &str) {
        if self.output.verbose {
            self.say(message);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_can_be_drawn() {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::hidden());
        for total in [0, 100] {
            let bar = bar(&bars, "a name\nof two lines", total);
            bar.inc(10);
            bar.finish();
        }
        for template in ["{prefix:16!} {binary_bytes_per_sec:>12}", "{prefix:16!} {spinner} {binary_bytes}"] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }

    #[test]
    fn tasks_are_counted() {
        let output = Output { json: false, quiet: true, verbose: false };
        let progress = Progress::new(&output, None);
        let (a, b) = (progress.start("a", 10), progress.start("b", 0));
        progress.advance(a, 4);
        progress.advance(a, 6);
        progress.advance(b, 1);
        progress.finish(a);
        progress.advance(a, 100);
        assert_eq!(progress.print(|| "printed"), "printed");
        let state = progress.state();
        assert_eq!((state.finished_bytes, state.tasks.len()), (10, 1));
        assert!(!progress.is_cancelled());
    }
}
