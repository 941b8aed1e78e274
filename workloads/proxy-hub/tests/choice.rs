//! A choice of a peer allocates nothing, whatever is asked for and however many peers there are.
#![allow(unsafe_code)]

use proxy_hub::registry::{Home, Needs, NewPeer, Registry, Sticky};
use proxy_hub::target::{Country, Target, parse_params};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed to the system's allocator unchanged; only a counter of the thread is added, which needs no
// allocation of its own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static GLOBAL: Counting = Counting;

#[test]
fn a_choice_allocates_nothing() {
    let registry = Registry::new();
    let countries = ["US", "DE", "GB"].map(|c| Country::parse(c).expect("code"));
    for n in 0..20_000u32 {
        registry.insert(&NewPeer {
            device: &format!("device-{n}"),
            version: "1.1.0",
            addr: [127, 0, 0, 1].into(),
            country: countries[n as usize % 3],
            state: "",
            city: ["miami", "berlin", "london", "leeds"][n as usize / 3 % 4],
            asn: 1000 + n % 50,
            home: Home { shard: 0, slot: n, serial: n },
            cap: 32,
            compact: true,
            udp: true,
            consent: true,
            now: 0,
        });
    }
    let ask = |text: &str, session: &str, random: u64| {
        let mut target = Target::default();
        parse_params(text, &mut target).expect("valid");
        let before = ALLOCATIONS.with(Cell::get);
        let sticky = Sticky { owner: "alice", session, replace: true, now: 1, life: 600 };
        let found = match session {
            "" => registry.choose(&target, &Needs::default(), random),
            _ => registry.choose_sticky(&sticky, &target, &Needs::default(), random),
        };
        (ALLOCATIONS.with(Cell::get) - before, found.is_some())
    };
    let mut random = 1u64;
    for i in 0..20_000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let text =
            ["rotate", "country-us", "country-gb-city-leeds", "city-berlin", "asn-1007", "country-de-asn-1003"][i % 6];
        assert_eq!(ask(text, "", random), (0, true), "{text}");
        // Sessions both new and old.
        let session = format!("s{}", i % 5000);
        assert_eq!(ask("country-us", &session, random), (0, true));
        assert_eq!(ask("city-atlantis", &session, random), (0, false));
    }
    // The counter counts.
    assert!(ALLOCATIONS.with(Cell::get) > 0);
}
