//! The wall clock as a value, so that tests can hold it still, and a stopwatch for the steps people see.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Reads the time of day. Cheap to clone. Shells read it once per turn and pass the value on.
#[derive(Clone, Debug, Default)]
pub struct Clock(Source);

#[derive(Clone, Debug, Default)]
enum Source {
    #[default]
    System,
    Manual(Arc<AtomicI64>),
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Clock(Source::System)
    }

    /// A clock that stands at `unix_micros` and moves only by the returned hand. For tests.
    pub fn manual(unix_micros: i64) -> (Self, Hand) {
        let cell = Arc::new(AtomicI64::new(unix_micros));
        (Clock(Source::Manual(cell.clone())), Hand(cell))
    }

    /// Microseconds since 1970-01-01T00:00:00Z: the resolution PostgreSQL stores.
    pub fn unix_micros(&self) -> i64 {
        match &self.0 {
            Source::System => micros(SystemTime::now()),
            Source::Manual(cell) => cell.load(Ordering::SeqCst),
        }
    }

    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub fn unix_millis(&self) -> i64 {
        self.unix_micros().div_euclid(1_000)
    }

    /// The same instant as a `SystemTime`, exact to the microsecond.
    pub fn now(&self) -> SystemTime {
        let micros = self.unix_micros();
        let distance = Duration::from_micros(micros.unsigned_abs());
        if micros >= 0 { UNIX_EPOCH + distance } else { UNIX_EPOCH - distance }
    }
}

fn micros(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |micros| -micros),
    }
}

/// Moves a manual clock.
#[derive(Clone, Debug)]
pub struct Hand(Arc<AtomicI64>);

impl Hand {
    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(i64::try_from(by.as_micros()).unwrap_or(i64::MAX), Ordering::SeqCst);
    }

    /// Sets the clock, backwards too.
    pub fn set(&self, unix_micros: i64) {
        self.0.store(unix_micros, Ordering::SeqCst);
    }
}

/// Measures how long a step took, on the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts measuring.
    pub fn start() -> Self {
        Stopwatch(Instant::now())
    }

    /// Milliseconds since the start, with fractions.
    pub fn ms(&self) -> f64 {
        self.0.elapsed().as_secs_f64() * 1e3
    }

    /// Milliseconds since the start or the last lap; the next lap begins now.
    pub fn lap_ms(&mut self) -> f64 {
        let now = Instant::now();
        let lap = now.duration_since(self.0).as_secs_f64() * 1e3;
        self.0 = now;
        lap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_by_its_hand() {
        let (clock, hand) = Clock::manual(1_000_000);
        assert_eq!(clock.clone().unix_millis(), 1_000);
        hand.advance(Duration::from_millis(5));
        assert_eq!(clock.unix_micros(), 1_005_000);
        hand.set(-1);
        assert_eq!(clock.unix_millis(), -1);
        assert_eq!(clock.now(), UNIX_EPOCH - Duration::from_micros(1));
    }

    #[test]
    fn the_system_clock_agrees_with_the_machine() {
        let before = micros(SystemTime::now());
        let now = Clock::system().unix_micros();
        assert!(now >= before && now - before < 10_000_000);
    }
}
