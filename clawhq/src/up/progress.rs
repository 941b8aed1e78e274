//! What a person sees while it works: one line a step, with its time.

use std::io::{IsTerminal, Write};
use std::time::Instant;

/// Prints steps. Plain text when the output is not a terminal or `NO_COLOR` is set.
pub struct Progress {
    colour: bool,
}

impl Progress {
    /// For standard output; `no_colour` is the environment's wish.
    pub fn new(no_colour: bool) -> Self {
        Progress { colour: std::io::stdout().is_terminal() && !no_colour }
    }

    /// Begins a step; it is shown as done by [`Step::done`], and stays open in the text when it is dropped.
    pub fn step(&self, title: &str) -> Step<'_> {
        if self.colour {
            print!("\r\x1b[K  … {title}");
            let _ = std::io::stdout().flush();
        }
        Step { progress: self, title: title.to_owned(), started: Instant::now() }
    }

    /// A line of plain text.
    pub fn say(&self, text: &str) {
        println!("{text}");
    }

    /// Makes text stand out.
    pub fn bold(&self, text: &str) -> String {
        if self.colour { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Makes text step back.
    pub fn dim(&self, text: &str) -> String {
        if self.colour { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A step under way.
pub struct Step<'a> {
    progress: &'a Progress,
    title: String,
    started: Instant,
}

impl Step<'_> {
    /// Says what is waited for, at a terminal only.
    pub fn note(&self, text: &str) {
        if self.progress.colour {
            let text: String = text.chars().take(60).collect();
            print!("\r\x1b[K  … {} \x1b[2m{text}\x1b[0m", self.title);
            let _ = std::io::stdout().flush();
        }
    }

    /// The step is done; `note` is added when not empty.
    pub fn done(self, note: &str) {
        let took = self.started.elapsed().as_secs_f64();
        let took = if took < 1.0 { format!("{:.0} ms", took * 1e3) } else { format!("{took:.1} s") };
        let note = if note.is_empty() { took } else { format!("{took}, {note}") };
        if self.progress.colour {
            println!("\r\x1b[K  \x1b[32m✓\x1b[0m {:<44} \x1b[2m{note}\x1b[0m", self.title);
        } else {
            println!("  ✓ {:<44} {note}", self.title);
        }
    }
}
