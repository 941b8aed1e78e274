//! Every frame survives its encoding, and nothing that is not one gets through.

use clawhq_init::{
    Claim, Exec, Exit, File, Hello, MAX_FILES, Oom, ProtocolError, Started, State, Step, Timings, ToAgent, ToInit,
    frame_len,
};

fn claim() -> Claim {
    Claim {
        claim_id: "slot_01".into(),
        generation: u64::MAX - 1,
        run: 3,
        argv: vec!["/bin/x".into(), String::new(), "ü".into()],
        env: vec![("A".into(), "b=c\n".into()), ("B".into(), String::new())],
        inherit_env: true,
        cwd: Some("/".into()),
        uid: 10001,
        gid: 10002,
        files: vec![
            File {
                path: "/run/secrets/key".into(),
                mode: 0o400,
                bytes: vec![0, 255, 1],
                secret: true,
                only_if_absent: true,
            },
            File { path: "/empty".into(), mode: 0, bytes: Vec::new(), secret: false, only_if_absent: false },
        ],
        stop_signal: 2,
    }
}

#[test]
fn frames_to_init_survive() {
    let mut bare = claim();
    (bare.cwd, bare.inherit_env) = (None, false);
    for frame in [
        ToInit::Claim(claim()),
        ToInit::Claim(bare),
        ToInit::Run { claim_id: "c".into(), run: 9 },
        ToInit::Files { request: 1 << 40, claim_id: "c".into(), uid: 1, gid: 2, files: claim().files.clone() },
        ToInit::Signal { signo: 64 },
        ToInit::Kill,
        ToInit::Ping,
        ToInit::Forget,
        ToInit::Shutdown,
        ToInit::ExecSpec(Exec {
            argv: vec!["sh".into()],
            env: vec![("T".into(), "x".into())],
            inherit_env: true,
            cwd: Some("/tmp".into()),
        }),
        ToInit::ExecRefused { reason: "used".into() },
    ] {
        let bytes = frame.encode().unwrap();
        let len = frame_len([bytes[0], bytes[1], bytes[2], bytes[3]], 1 << 20).unwrap();
        assert_eq!(len, bytes.len() - 4);
        assert_eq!(ToInit::decode(&bytes[4..]), Ok(frame));
        // A frame cut short anywhere is never another frame.
        if bytes.len() > 5 {
            for end in 5..bytes.len() {
                let cut = ToInit::decode(&bytes[4..end]);
                assert_ne!(cut, ToInit::decode(&bytes[4..]), "cut at {end}");
            }
        }
    }
}

#[test]
fn frames_to_the_node_agent_survive() {
    let failed =
        |what: &str| State::Failed { claim_id: "c".into(), run: 1, errno: 2, step: Step::Cwd, what: what.into() };
    let mut frames = vec![
        ToAgent::Pong,
        ToAgent::ExecHello { ticket: "t".into() },
        ToAgent::Started(Started {
            claim_id: "c".into(),
            run: 2,
            pid: 7,
            timings: Timings { received_ns: 1, prepared_ns: 2, started_ns: u64::MAX },
        }),
        ToAgent::FilesWritten { request: 4, errno: 28, what: "/f".into() },
        ToAgent::Exited { claim_id: "c".into(), run: 1, exit: Exit::Signal(9), oom: Oom::Yes },
    ];
    for state in [
        State::Waiting,
        State::Running { claim_id: "c".into(), run: 1, pid: 2 },
        State::Exited { claim_id: "c".into(), run: 1, exit: Exit::Code(255), oom: Oom::No },
        failed(""),
        failed("/x y"),
    ] {
        frames.push(ToAgent::Hello(Hello { version: 1, boot: [7; 16], state }));
    }
    for step in [Step::Claim, Step::File, Step::Cwd, Step::Ids, Step::Exec, Step::Spawn] {
        frames.push(ToAgent::StartFailed { claim_id: "c".into(), run: 1, errno: 13, step, what: "w".into() });
    }
    for frame in frames {
        assert_eq!(ToAgent::decode(&frame.encode()[4..]), Ok(frame));
    }
}

#[test]
fn a_long_path_is_cut_so_that_the_answer_still_fits() {
    let frame = ToAgent::FilesWritten { request: 1, errno: 36, what: "ü".repeat(50_000) };
    match ToAgent::decode(&frame.encode()[4..]) {
        Ok(ToAgent::FilesWritten { what, .. }) => assert_eq!(what, "ü".repeat(2047)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn bounds_hold_on_both_sides() {
    type Change = fn(&mut Claim);
    let broken: [(&str, Change); 15] = [
        ("claim id", |c| c.claim_id.clear()),
        ("claim id", |c| c.claim_id = "x".repeat(65)),
        ("claim id", |c| c.claim_id = "a b".into()),
        ("run", |c| c.run = 0),
        ("argv", |c| c.argv.clear()),
        ("argv", |c| c.argv[0].clear()),
        ("argv", |c| c.argv[1].push('\0')),
        ("env", |c| c.env[0].0 = "A=B".into()),
        ("env", |c| c.env[0].0.clear()),
        ("env", |c| c.env[0].1.push('\0')),
        ("cwd", |c| c.cwd = Some("relative".into())),
        ("file path", |c| c.files[0].path = "/a/../b".into()),
        ("file path", |c| c.files[0].path = "/a/".into()),
        ("files", |c| c.files = vec![c.files[1].clone(); MAX_FILES + 1]),
        ("stop signal", |c| c.stop_signal = 65),
    ];
    for (what, change) in broken {
        let mut claim = claim();
        change(&mut claim);
        let refused = ToInit::Claim(claim).encode();
        assert_eq!(refused, Err(ProtocolError::Invalid(what)));
    }
    // The receiver does not rely on the sender's checks: run 0 by hand.
    let mut bytes = ToInit::Run { claim_id: "c".into(), run: 1 }.encode().unwrap();
    let last = bytes.len() - 4;
    bytes[last..].fill(0);
    assert_eq!(ToInit::decode(&bytes[4..]), Err(ProtocolError::Invalid("run")));
    assert_eq!(ToInit::decode(&[]), Err(ProtocolError::Length(0)));
    assert_eq!(ToInit::decode(&[0x55]), Err(ProtocolError::UnknownFrame(0x55)));
    assert_eq!(frame_len([0, 0, 0, 1], 1 << 20), Err(ProtocolError::Length(1 << 24)));
}

#[test]
fn arbitrary_bytes_never_panic() {
    // xorshift: the same bytes every time.
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let valid = ToInit::Claim(claim()).encode().unwrap();
    for _ in 0..200_000 {
        let mut bytes = valid[4..].to_vec();
        for _ in 0..1 + next() % 4 {
            let at = next() as usize % bytes.len();
            bytes[at] = next() as u8;
        }
        bytes.truncate(1 + next() as usize % bytes.len());
        let _ = ToInit::decode(&bytes);
        bytes[0] = 0x81 + (next() % 7) as u8;
        let _ = ToAgent::decode(&bytes);
    }
}

#[test]
fn debug_shows_no_value() {
    let text = format!("{:?}", ToInit::Claim(claim()));
    assert!(text.contains("/run/secrets/key") && text.contains("\"A\""));
    assert!(!text.contains("b=c") && !text.contains("255"), "{text}");
}
