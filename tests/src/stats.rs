//! Figures of a sample.

/// Order statistics of a sample.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub p50: f64,
    pub p99: f64,
    pub most: f64,
    pub count: usize,
}

/// By the nearest rank; zeros for an empty sample.
pub fn spread(sample: &[f64]) -> Spread {
    let mut sorted = sample.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = |share: f64| match sorted.len() {
        0 => 0.0,
        n => sorted[((share * n as f64).ceil() as usize).clamp(1, n) - 1],
    };
    Spread { p50: rank(0.5), p99: rank(0.99), most: rank(1.0), count: sorted.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_the_nearest() {
        let sample: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        let all = spread(&sample);
        assert_eq!((all.p50, all.p99, all.most, all.count), (100.0, 198.0, 200.0, 200));
        assert_eq!(spread(&[7.0]).p99, 7.0);
        assert_eq!(spread(&[]).count, 0);
    }
}
