//! Minting of identifiers. Their types and text form are in `clawhq-domain`; only the clock and the random source are here.

/// A fresh id: the 128 bits of a UUIDv7, as any of the domain's id types.
///
/// Ids minted by one process only ever grow, also within a millisecond and when the wall clock steps back, so an index on
/// them is appended to rather than written all over.
///
/// ```
/// let a: u128 = clawhq_runtime::ids::mint();
/// let b: u128 = clawhq_runtime::ids::mint();
/// assert!(a < b);
/// ```
pub fn mint<T: From<u128>>() -> T {
    T::from(uuid::Uuid::now_v7().as_u128())
}

#[cfg(test)]
mod tests {
    use super::mint;

    #[test]
    fn ids_are_version_7_and_grow_across_threads() {
        let threads: Vec<_> =
            (0..4).map(|_| std::thread::spawn(|| (0..5_000).map(|_| mint::<u128>()).collect::<Vec<_>>())).collect();
        let mut all = Vec::new();
        for thread in threads {
            let ids = thread.join().expect("minting does not panic");
            assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
            all.extend(ids);
        }
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count, "no id was minted twice");
        assert!(all.iter().all(|id| uuid::Uuid::from_u128(*id).get_version_num() == 7));
    }
}
