//! The Autobahn cases, driven by kosoku (`pip install kosoku`) against the echo server of the examples.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn no_case_fails_and_none_is_non_strict() {
    let kosoku = std::env::var_os("KOSOKU").map(PathBuf::from).or_else(|| {
        std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join("kosoku")).find(|file| file.is_file())
    });
    let kosoku = kosoku.expect(
        "kosoku is neither on PATH nor named by KOSOKU: `pip install kosoku` into a virtual environment, or ./dev test, which does so",
    );
    // Examples are built beside the tests: target/PROFILE/examples, this file in target/PROFILE/deps.
    let here = std::env::current_exe().expect("own path");
    let profile = here.parent().and_then(|deps| deps.parent()).expect("target directory");
    let child = Command::new(profile.join("examples/ws_echo"))
        .arg("127.0.0.1:0")
        .stdout(Stdio::piped())
        .spawn()
        .expect("the example is built with the tests");
    let mut server = Kill(child);
    let mut addr = String::new();
    BufReader::new(server.0.stdout.take().expect("piped")).read_line(&mut addr).expect("its address");

    let out = std::env::temp_dir().join(format!("autobahn-{}", std::process::id()));
    // 12.* and 13.* are about compression, which is never accepted.
    let args = ["-m", "fuzzingclient", "-p", "4", "-x", "12.*", "-x", "13.*"];
    let run = Command::new(kosoku).args(args).arg("-o").arg(&out).arg(addr.trim()).output().expect("kosoku runs");
    let report = std::fs::read_to_string(out.join("index.json")).unwrap_or_else(|error| {
        panic!("no report: {error}\n{}\n{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr))
    });
    let _ = std::fs::remove_dir_all(&out);
    let count = |word: &str| report.matches(&format!("\"behavior\": \"{word}\"")).count();
    let close = |word: &str| report.matches(&format!("\"behaviorClose\": \"{word}\"")).count();
    println!("OK {}, INFORMATIONAL {}", count("OK"), count("INFORMATIONAL"));
    assert_eq!((count("FAILED"), count("NON-STRICT"), count("UNCLEAN")), (0, 0, 0), "{report}");
    assert_eq!((close("FAILED"), close("WRONG CODE"), close("UNCLEAN")), (0, 0, 0), "{report}");
    assert!(count("OK") >= 298, "only {} cases ran: {report}", count("OK"));
}
