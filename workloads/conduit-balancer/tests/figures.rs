//! What the service says of itself and of conduits: page, JSON, Prometheus, token.

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;
use support::*;

#[test]
fn clients_are_counted_by_country_behind_a_proxy_too() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("country.mmdb");
    std::fs::write(&file, country_database(&[(127, "DE"), (192, "IR"), (200, "BR")])).unwrap();
    let echo = Echo::start("e");
    let balancer = Balancer::start(&format!(
        "[service]\nconnections = 100\nworkers = 2\n[geo]\ndatabase = '{}'\n\
         [[listener]]\nname = 'plain'\nprotocol = 'tcp'\nlisten = '127.0.0.1:0'\npool = 'p'\n\
         [[listener]]\nname = 'proxied'\nprotocol = 'tcp'\nlisten = '127.0.0.1:0'\npool = 'q'\nproxy_in = 'required'\ntrusted = ['127.0.0.0/8']\n\
         [[pool]]\nname = 'p'\n[[pool.backend]]\naddr = '{addr}'\n[[pool]]\nname = 'q'\n[[pool.backend]]\naddr = '{addr}'\n",
        file.display(),
        addr = echo.addr
    ));
    let mut plain = balancer.connect("plain");
    assert_eq!(line(&mut plain), "e");
    let mut proxied = balancer.connect("proxied");
    proxied.write_all(b"PROXY TCP4 192.0.2.9 192.0.2.1 4000 443\r\n").unwrap();
    assert_eq!(line(&mut proxied), "e");
    let mut elsewhere = balancer.connect("proxied");
    elsewhere.write_all(b"PROXY TCP4 8.8.8.8 192.0.2.1 4000 443\r\n").unwrap();
    assert_eq!(line(&mut elsewhere), "e");
    drop(elsewhere);
    let country = |code: &str| {
        let stats = balancer.stats();
        let found = stats["countries"].as_array().unwrap().iter().find(|country| country["code"] == code).cloned();
        found.map(|country| (country["now"].as_u64().unwrap(), country["total"].as_u64().unwrap()))
    };
    assert_eq!((country("DE"), country("IR"), country("BR")), (Some((1, 1)), Some((1, 1)), None));
    until("the unknown one to leave", || (country("??") == Some((0, 1))).then_some(()));
    drop(proxied);
    until("the count to fall", || (country("IR") == Some((0, 1))).then_some(()));
    let (_, metrics) = balancer.ask("GET", "/metrics", "");
    assert!(metrics.contains("balancer_clients_by_country{country=\"DE\"} 1\n"), "{metrics}");
    assert!(metrics.contains("balancer_backend_connect_seconds_count{pool=\"q\",backend=\""), "{metrics}");
}

#[test]
fn conduits_are_read_and_summed() {
    let metrics = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/metrics", metrics.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in metrics.incoming().map_while(Result::ok) {
            let mut stream = stream;
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let body = "conduit_connected_clients 30\nconduit_connecting_clients 4\nconduit_is_live 1\nconduit_bytes_uploaded 1000\n\
                        conduit_region_connected_clients{scope=\"common\",region=\"IR\"} 30\n";
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let (stats, log) = (dir.path().join("stats.json"), dir.path().join("log"));
    std::fs::write(
        &stats,
        r#"{"connectedClients":9,"connectingClients":0,"totalBytesUp":24,"totalBytesDown":5,"isLive":true}"#,
    )
    .unwrap();
    std::fs::write(
        &log,
        "2026-01-24 19:52:51 [STATS] Connecting: 1 | Connected: 1 | Up: 1.0 KB | Down: 0 B | Uptime: 5s\n",
    )
    .unwrap();
    let balancer = Balancer::start(&format!(
        "[service]\nconnections = 100\nworkers = 1\n[[listener]]\nname = 'l'\nprotocol = 'tcp'\nlisten = '127.0.0.1:0'\npool = 'p'\n[[pool]]\nname = 'p'\n\
         [conduits]\ninterval = '200ms'\n[[conduit]]\nname = 'm'\nmetrics = '{url}'\n[[conduit]]\nname = 's'\nstats_file = '{}'\n\
         [[conduit]]\nname = 'l'\nlog_file = '{}'\n[[conduit]]\nname = 'gone'\nmetrics = 'http://{}/metrics'\n",
        stats.display(),
        log.display(),
        free_addr()
    ));
    let conduits = until("all conduits to be read", || {
        let conduits = balancer.stats()["conduits"].clone();
        (conduits["read"] == 3).then_some(conduits)
    });
    assert_eq!((conduits["connected"].as_u64(), conduits["connecting"].as_u64()), (Some(40), Some(5)));
    assert_eq!((conduits["bytes_up"].as_u64(), conduits["failed"].as_u64()), (Some(1000 + 24 + 1024), Some(1)));
    assert_eq!(conduits["instances"][0]["share"], 0.75);
    assert_eq!(conduits["regions"]["IR"]["connected"], 30);
    assert!(conduits["instances"][3]["note"].as_str().unwrap().contains("refused"));
    let (_, metrics) = balancer.ask("GET", "/metrics", "");
    for line in [
        "balancer_conduits_connected_clients 40\n",
        "balancer_conduit_up{conduit=\"gone\"} 0\n",
        "balancer_conduits_region_connected_clients{region=\"IR\"} 30\n",
    ] {
        assert!(metrics.contains(line), "{metrics}");
    }
    // The figures follow their source.
    std::fs::write(&stats, r#"{"connectedClients":19}"#).unwrap();
    until("the new figure", || (balancer.stats()["conduits"]["connected"] == 50).then_some(()));
}

#[test]
fn figures_need_the_token_and_the_page_does_not() {
    let balancer = Balancer::start(
        "[admin]\nlisten = '127.0.0.1:0'\ntoken = 'sixteen characters'\n[service]\nworkers = 1\nconnections = 10\n\
         [[listener]]\nname = 'l'\nprotocol = 'tcp'\nlisten = '127.0.0.1:0'\npool = 'p'\n[[pool]]\nname = 'p'\n",
    );
    for (path, status) in [("/", 200), ("/page.js", 200), ("/healthz", 200), ("/stats", 401), ("/metrics", 401)] {
        assert_eq!(balancer.ask("GET", path, "").0, status, "{path}");
    }
    assert_eq!(balancer.ask("POST", "/api/reload", "").0, 401);
    assert_eq!(balancer.ask_with("GET", "/stats", "", "Authorization: Bearer sixteen character\r\n").0, 401);
    assert_eq!(balancer.ask_with("GET", "/stats", "", "Authorization: Bearer sixteen characters\r\n").0, 200);
}

#[test]
fn a_web_page_cannot_change_a_service_without_token() {
    let balancer = Balancer::start(
        "[service]\nworkers = 1\nconnections = 10\n[[listener]]\nname = 'l'\nprotocol = 'tcp'\nlisten = '127.0.0.1:0'\npool = 'p'\n[[pool]]\nname = 'p'\n",
    );
    assert_eq!(balancer.ask_with("POST", "/api/reload", "", "Origin: https://elsewhere.example\r\n").0, 403);
    assert_eq!(balancer.ask("POST", "/api/reload", "").0, 204);
}
