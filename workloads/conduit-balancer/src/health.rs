//! Whether a backend takes new flows, and how many: a pure state machine over check results, failed connects and time.

use crate::board::Control;
use crate::config::{Check, Outlier};
use std::time::{Duration, Instant};

/// What is known of one backend.
#[derive(Debug, Clone)]
pub struct Health {
    up: bool,
    good: u32,
    bad: u32,
    /// Why the last check failed, empty when it was good.
    pub last: Option<String>,
    ejected_until: Option<Instant>,
    ejections: u32,
    /// Since when it has been in service without a break.
    since: Option<Instant>,
}

/// How a backend stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Up,
    /// In service with a growing share.
    Starting,
    Draining,
    /// Its checks fail.
    Down,
    /// Its connects failed too often.
    Ejected,
}

impl Standing {
    pub fn word(self) -> &'static str {
        match self {
            Standing::Up => "up",
            Standing::Starting => "starting",
            Standing::Draining => "draining",
            Standing::Down => "down",
            Standing::Ejected => "ejected",
        }
    }
}

impl Health {
    /// A backend is in service until something speaks against it. `fresh` ones start slowly, those of the first
    /// configuration do not: there is nobody to relieve them.
    pub fn new(fresh: Option<Instant>) -> Self {
        Health { up: true, good: 0, bad: 0, last: None, ejected_until: None, ejections: 0, since: fresh }
    }

    /// Takes a check's result; `true` when the backend went up or down by it.
    pub fn checked(&mut self, result: Result<(), String>, check: &Check, now: Instant) -> bool {
        match result {
            Ok(()) => {
                (self.good, self.bad, self.last) = (self.good.saturating_add(1), 0, Some(String::new()));
                if !self.up && self.good >= check.rise {
                    self.up = true;
                    self.since = Some(now);
                    return true;
                }
            }
            Err(why) => {
                (self.good, self.bad, self.last) = (0, self.bad.saturating_add(1), Some(why));
                if self.up && self.bad >= check.fall {
                    self.up = false;
                    return true;
                }
            }
        }
        false
    }

    /// Whether `failures` in a row call for an ejection.
    pub fn wants_ejection(&self, streak: u64, outlier: &Outlier) -> bool {
        self.up && self.ejected_until.is_none() && streak >= u64::from(outlier.failures)
    }

    pub fn eject(&mut self, outlier: &Outlier, now: Instant) {
        self.ejections = (self.ejections + 1).min(10);
        self.ejected_until = Some(now + outlier.ejection.0 * self.ejections);
    }

    /// Ends an ejection that is over; `true` when it did.
    pub fn readmit(&mut self, now: Instant) -> bool {
        if self.ejected_until.is_some_and(|until| now >= until) {
            self.ejected_until = None;
            self.since = Some(now);
            return true;
        }
        // A good while in service earns the short first ejection again.
        if self.ejections > 0
            && self.ejected_until.is_none()
            && self.since.is_some_and(|since| now - since > Duration::from_secs(300))
        {
            self.ejections = 0;
        }
        false
    }

    /// In service, but its last check failed.
    pub fn is_doubtful(&self) -> bool {
        self.up && self.bad > 0
    }

    pub fn is_ejected(&self) -> bool {
        self.ejected_until.is_some()
    }

    /// What workers are to do with it now.
    pub fn control(&self, weight: u32, drain: bool, slow_start: Duration, now: Instant) -> (Standing, Control) {
        if !self.up {
            return (Standing::Down, Control::down());
        }
        if self.ejected_until.is_some() {
            return (Standing::Ejected, Control::down());
        }
        if drain {
            return (Standing::Draining, Control::up(0));
        }
        let full = u64::from(weight) * 256;
        let age = self.since.map(|since| now.saturating_duration_since(since)).filter(|age| *age < slow_start);
        match age {
            // From a tenth to the whole, in steps that keep tables from being rebuilt all the time.
            Some(age) => {
                let share = (age.as_millis() * 20 / slow_start.as_millis()) as u64;
                (Standing::Starting, Control::up((full * (share + 2) / 22).max(1)))
            }
            None => (Standing::Up, Control::up(full)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CheckKind, Span};

    const SECOND: Duration = Duration::from_secs(1);

    fn check() -> Check {
        Check { kind: CheckKind::Tcp, interval: Span(SECOND), timeout: Span(SECOND), rise: 2, fall: 3, port: None }
    }

    #[test]
    fn falls_after_three_and_rises_after_two() {
        let now = Instant::now();
        let mut health = Health::new(None);
        let no = || Err("refused".to_string());
        assert!(!health.checked(no(), &check(), now) && !health.checked(no(), &check(), now));
        assert!(!health.checked(Ok(()), &check(), now), "a good one between starts the count anew");
        assert!(!health.checked(no(), &check(), now) && !health.checked(no(), &check(), now));
        assert!(health.checked(no(), &check(), now));
        assert_eq!(health.control(1, false, SECOND, now).0, Standing::Down);
        assert!(!health.checked(Ok(()), &check(), now));
        assert!(health.checked(Ok(()), &check(), now));
        assert_eq!(health.control(1, false, SECOND, now).0, Standing::Starting);
        assert_eq!(health.control(1, false, SECOND, now + SECOND).0, Standing::Up);
    }

    #[test]
    fn ejections_grow_and_end() {
        let start = Instant::now();
        let outlier = Outlier { failures: 5, ejection: Span(SECOND), most_percent: 50 };
        let mut health = Health::new(None);
        assert!(!health.wants_ejection(4, &outlier) && health.wants_ejection(5, &outlier));
        health.eject(&outlier, start);
        assert!(!health.wants_ejection(50, &outlier), "ejected already");
        assert!(!health.readmit(start + SECOND / 2) && health.readmit(start + SECOND));
        health.eject(&outlier, start + SECOND);
        assert!(!health.readmit(start + SECOND * 2) && health.readmit(start + SECOND * 3));
    }

    #[test]
    fn slow_start_grows_to_the_whole_weight() {
        let start = Instant::now();
        let health = Health::new(Some(start));
        let weights: Vec<u64> =
            (0..=10).map(|tenth| health.control(100, false, SECOND, start + SECOND * tenth / 10).1.weight()).collect();
        assert!(weights.is_sorted() && weights[0] < 25_600 / 9 && weights[0] > 0, "{weights:?}");
        assert_eq!(weights[10], 25_600);
        assert_eq!(health.control(100, true, SECOND, start), (Standing::Draining, Control::up(0)));
    }
}
