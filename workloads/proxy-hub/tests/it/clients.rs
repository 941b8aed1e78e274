//! Clients as people have them: curl, requests with PySocks, proxychains.

use crate::common::{TestHub, http_origin, left_out, need, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_by_every_way_in() {
    if !need("curl", "curl") {
        return;
    }
    let hub = TestHub::start().await;
    hub.peers(20).await;
    let origin = http_origin().await;
    let proxy = hub.server.customers;
    let url = format!("http://{origin}/path?q=1");
    let named = format!("http://localhost:{}/", origin.port());
    let body = "x".repeat(100_000);
    let sent = hub.dir.path().join("body");
    std::fs::write(&sent, &body).expect("body");

    for (what, args) in [
        ("socks5h", vec!["-x".to_owned(), format!("socks5h://alice:key@{proxy}"), named.clone()]),
        ("socks5", vec!["-x".to_owned(), format!("socks5://alice:key@{proxy}"), url.clone()]),
        ("http, absolute form", vec!["-x".to_owned(), format!("http://alice:key@{proxy}"), url.clone()]),
        ("http, CONNECT", vec!["-p".to_owned(), "-x".to_owned(), format!("http://alice:key@{proxy}"), named.clone()]),
        (
            "parameters behind the key",
            vec!["-x".to_owned(), format!("http://alice:key-country-us-session-1@{proxy}"), url.clone()],
        ),
    ] {
        let mut all = vec!["-sS", "--noproxy", "", "-m", "10"];
        all.extend(args.iter().map(String::as_str));
        let (code, out, err) = run("curl", &all).await;
        assert_eq!(code, Some(0), "{what}: {err}");
        assert!(out.starts_with("from 127."), "{what}: {out}");
        assert!(!out.to_ascii_lowercase().contains("proxy-"), "{what} told the origin about the proxy: {out}");
    }
    // A body, in one piece and in chunks, and a second request on the same client.
    for extra in [vec![], vec!["-H", "Transfer-Encoding: chunked"]] {
        let data = format!("@{}", sent.display());
        let x = format!("http://alice:key@{proxy}");
        let mut all = vec!["-sS", "--noproxy", "", "-m", "10", "-x", &x, "--data-binary", &data, &url];
        all.extend(&extra);
        let (code, out, err) = run("curl", &all).await;
        assert_eq!(code, Some(0), "{err}");
        if extra.is_empty() {
            assert!(out.contains("body 100000"), "{out}");
        }
    }
    let x = format!("http://alice:key@{proxy}");
    let (code, out, _) = run("curl", &["-sS", "--noproxy", "", "-m", "10", "-x", &x, &url, &url]).await;
    assert_eq!((code, out.matches("from 127.").count()), (Some(0), 2));
    // Plain HTTP/1.0.
    let (code, out, _) = run("curl", &["-sS", "-0", "--noproxy", "", "-m", "10", "-x", &x, &url]).await;
    assert_eq!(code, Some(0));
    assert!(out.contains("HTTP/1.0"), "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_is_told_why_not() {
    if !need("curl", "curl") {
        return;
    }
    let hub = TestHub::start().await;
    hub.peers(3).await;
    let origin = http_origin().await;
    let proxy = hub.server.customers;
    let url = format!("http://{origin}/");
    let ask = |x: String, url: String| async move {
        run("curl", &["-sS", "-i", "--noproxy", "", "-m", "10", "-x", &x, &url]).await
    };
    let (code, ..) = ask(format!("socks5h://alice:wrong@{proxy}"), url.clone()).await;
    assert_eq!(code, Some(97));
    for (user, url, status, reason) in [
        ("alice:wrong", url.as_str(), "407", "unknown user or wrong key"),
        ("alice-contry-us:key", &url, "407", "unknown parameter 'contry'"),
        ("alice:key-country-usa", &url, "407", "not a two-letter country code"),
        ("alice:key-country-zz", &url, "503", "no exit available for ZZ"),
        ("alice:key", "http://192.168.1.1/", "403", "private, local or reserved address"),
        ("alice:key", "http://[::ffff:10.0.0.1]/", "403", "private, local or reserved address"),
        ("alice:key", "http://169.254.169.254/latest", "403", "private, local or reserved address"),
        ("alice:key", "http://127.0.0.1:25/", "403", "port is not allowed"),
    ] {
        let (code, out, err) = ask(format!("http://{user}@{proxy}"), url.to_owned()).await;
        assert_eq!(code, Some(0), "{user} {url}: {err}");
        assert!(out.starts_with(&format!("HTTP/1.1 {status} ")), "{user} {url}: {out}");
        assert!(out.contains(reason), "{user} {url}: {out}");
        assert_eq!(out.contains("Proxy-Authenticate: Basic"), status == "407", "{out}");
    }
    let (_, out, _) =
        run("curl", &["-sS", "-i", "--noproxy", "", "-m", "10", "-x", &format!("http://{proxy}"), &url]).await;
    assert!(out.starts_with("HTTP/1.1 407 ") && out.contains("user name and key are needed"), "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_requests_over_pysocks() {
    // A Python of the user's own may stand before the distribution's, which has the packages.
    let named = std::env::var("PROXY_HUB_PYTHON").into_iter();
    let mut python = None;
    for candidate in named.chain(["python3".to_owned(), "/usr/bin/python3".to_owned()]) {
        let tried = tokio::process::Command::new(&candidate).args(["-c", "import requests, socks"]).output().await;
        if tried.is_ok_and(|out| out.status.success()) {
            python = Some(candidate);
            break;
        }
    }
    let Some(python) = python else {
        let remedy = "install the packages python3-requests and python3-socks (./dev test does), or name a Python that \
                      has requests and PySocks in PROXY_HUB_PYTHON";
        left_out("requests", remedy);
        return;
    };
    let hub = TestHub::start().await;
    hub.peers(10).await;
    let origin = http_origin().await;
    let script = format!(
        "import requests\n\
         for scheme in ('socks5h', 'socks5', 'http'):\n\
        \x20   p = f'{{scheme}}://alice-cc-us:key@{proxy}'\n\
        \x20   s = requests.Session(); s.trust_env = False; s.proxies = {{'http': p, 'https': p}}\n\
        \x20   for _ in range(5):\n\
        \x20       r = s.post('http://{origin}/', data=b'y' * 50000, timeout=10)\n\
        \x20       assert r.status_code == 200 and 'body 50000' in r.text, r.text\n\
         print('fine')\n",
        proxy = hub.server.customers
    );
    let (code, out, err) = run(&python, &["-c", &script]).await;
    assert_eq!((code, out.trim()), (Some(0), "fine"), "{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxychains_takes_a_program_along() {
    if !need("proxychains4", "proxychains4") || !need("curl", "curl") {
        return;
    }
    let hub = TestHub::start().await;
    hub.peers(5).await;
    let origin = http_origin().await;
    let file = hub.dir.path().join("proxychains.conf");
    let proxy = hub.server.customers;
    let text = format!(
        "strict_chain\nproxy_dns\ntcp_read_time_out 10000\ntcp_connect_time_out 5000\n[ProxyList]\nsocks5 {} {} alice key\n",
        proxy.ip(),
        proxy.port()
    );
    std::fs::write(&file, text).expect("config");
    let config = file.display().to_string();
    let url = format!("http://{origin}/");
    let (code, out, err) = run("proxychains4", &["-q", "-f", &config, "curl", "-sS", "-m", "10", &url]).await;
    assert_eq!(code, Some(0), "{err}");
    assert!(out.starts_with("from 127."), "{out}");
    assert_eq!(hub.server.shared.metrics.requests(proxy_hub::metrics::Outcome::Ok), 1, "it went through the hub");
}

/// The packages of tests/node, installed once beside the build.
async fn node_packages() -> Option<std::path::PathBuf> {
    if !need("node", "nodejs") || !need("npm", "npm") {
        return None;
    }
    let home = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("proxy-hub-node");
    std::fs::create_dir_all(&home).expect("a place for packages");
    let lock = std::fs::File::create(home.join("lock")).expect("lock");
    lock.lock().expect("locked");
    let wanted = include_str!("../node/package-lock.json");
    if std::fs::read_to_string(home.join("installed")).ok().as_deref() != Some(wanted) {
        std::fs::write(home.join("package.json"), include_str!("../node/package.json")).expect("package.json");
        std::fs::write(home.join("package-lock.json"), wanted).expect("package-lock.json");
        let prefix = home.display().to_string();
        let (code, _, err) =
            run("npm", &["ci", "--prefix", &prefix, "--ignore-scripts", "--no-audit", "--no-fund"]).await;
        if code != Some(0) {
            left_out("npm", &format!("its packages could not be installed ({})", err.trim()));
            return None;
        }
        std::fs::write(home.join("installed"), wanted).expect("noted");
    }
    // Imports are looked up from where the script lies.
    std::fs::write(home.join("clients.mjs"), include_str!("../node/clients.mjs")).expect("script");
    Some(home.join("clients.mjs"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_with_undici_and_socks_proxy_agent() {
    let Some(script) = node_packages().await else { return };
    let hub = TestHub::start().await;
    hub.peers(10).await;
    let origin = http_origin().await;
    let (proxy, origin) = (hub.server.customers.to_string(), origin.to_string());
    let script = script.display().to_string();
    let (code, out, err) = run("node", &[&script, &proxy, &origin, "alice-cc-us", "key"]).await;
    assert_eq!((code, out.trim()), (Some(0), "fine"), "{err}");
    hub.quiet().await;
    // Four rounds of eight by undici, three by socks-proxy-agent, 50,000 bytes of body each, and their heads.
    let (up, _) = hub.billed("alice");
    assert!((56 * 50_000..56 * 51_000).contains(&up), "{up}");
}
