//! How long to wait before trying again.

use crate::Millis;

/// Doubling from `first_ms` up to `most_ms`, with a quarter of it spread by `seed` so that many do not return at once.
///
/// `attempt` counts from 1. The same arguments give the same wait.
pub fn next(attempt: u32, first_ms: Millis, most_ms: Millis, seed: u64) -> Millis {
    let doubled = first_ms.saturating_mul(1_i64.checked_shl(attempt.saturating_sub(1).min(40)).unwrap_or(i64::MAX));
    let base = doubled.clamp(first_ms.min(most_ms), most_ms);
    let spread = base / 4;
    if spread == 0 { base } else { base - (seed % spread as u64) as Millis }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn it_doubles_up_to_its_ceiling() {
        let waits: Vec<_> = (1..=6).map(|attempt| next(attempt, 1000, 10_000, 0)).collect();
        assert_eq!(waits, [1000, 2000, 4000, 8000, 10_000, 10_000]);
    }

    proptest! {
        #[test]
        fn it_stays_within_bounds(attempt: u32, first in 1_i64..100_000, seed: u64) {
            let wait = next(attempt, first, 300_000, seed);
            prop_assert!(wait > 0 && wait <= 300_000);
            prop_assert!(wait >= first.min(300_000) * 3 / 4);
        }
    }
}
