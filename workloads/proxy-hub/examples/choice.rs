//! How long a choice of a peer takes among 100,000, and whether it allocates: prints JSON.
#![allow(unsafe_code)]

use proxy_hub::registry::{Home, Needs, NewPeer, Registry, Sticky};
use proxy_hub::target::{Country, Target, parse_params};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed to the system's allocator unchanged; only a counter is added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static GLOBAL: Counting = Counting;

fn main() {
    const PEERS: u32 = 100_000;
    const CHOICES: usize = 400_000;
    let countries = ["US", "DE", "GB", "FR", "JP", "SG", "BR", "IN", "NL", "ES"];
    let cities: Vec<String> = (0..50).map(|i| format!("city {i}")).collect();
    let registry = Registry::new();
    for n in 0..PEERS {
        // Half in the first country, as in a real network.
        let c = if n % 2 == 0 { 0 } else { 1 + (n as usize / 2) % 9 };
        registry.insert(&NewPeer {
            device: &format!("device-{n}"),
            version: "1.1.0",
            addr: [127, 0, 0, 1].into(),
            country: Country::parse(countries[c]).expect("code"),
            state: &cities[n as usize / 7 % 50],
            city: &cities[n as usize / 3 % 50],
            asn: 1000 + n % 97,
            home: Home { shard: 0, slot: n, serial: n },
            cap: 32,
            compact: true,
            udp: true,
            consent: true,
            now: 0,
        });
    }
    let targets: Vec<Target> = (0..500)
        .map(|i| {
            let mut target = Target::default();
            let text = match i % 4 {
                0 => format!("country-{}", countries[i / 4 % 10]),
                1 => format!("country-{}-city-city_{}", countries[i / 4 % 10], i % 50),
                2 => format!("country-us-session-s{i}"),
                _ => format!("country-{}-city-city_{}-session-s{i}", countries[i / 4 % 10], i % 50),
            };
            parse_params(&text, &mut target).expect("valid");
            target
        })
        .collect();
    let mut random = 88_172_645_463_325_252u64;
    let mut took = Vec::with_capacity(CHOICES);
    let mut found = 0u64;
    let mut ask = |target: &Target| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let mixed = random.wrapping_mul(0x2545_f491_4f6c_dd1d);
        match target.sticky() {
            Some(session) => {
                let sticky = Sticky { owner: "alice", session, replace: true, now: 1, life: 600 };
                registry.choose_sticky(&sticky, target, &Needs::default(), mixed)
            }
            None => registry.choose(target, &Needs::default(), mixed),
        }
    };
    for target in &targets {
        ask(target);
    }
    let before = ALLOCATIONS.load(Relaxed);
    for i in 0..CHOICES {
        let target = &targets[i * 7 % 500];
        let began = Instant::now();
        let choice = ask(target);
        took.push(began.elapsed().as_nanos() as u64);
        found += u64::from(choice.is_some());
    }
    let allocations = ALLOCATIONS.load(Relaxed) - before;
    took.sort_unstable();
    println!(
        "{{\"choices\":{CHOICES},\"found\":{found},\"p50_ns\":{},\"p99_ns\":{},\"p999_ns\":{},\"allocations\":{allocations}}}",
        took[CHOICES / 2],
        took[CHOICES * 99 / 100],
        took[CHOICES * 999 / 1000]
    );
}
