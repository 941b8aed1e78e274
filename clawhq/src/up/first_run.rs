//! The first org, person and workload, made the way anybody would make them: through the public API.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reqwest::{Method, StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Who may sign in first, and what came of the first deploy. Kept 0600 in the data directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FirstRun {
    pub email: String,
    pub password: String,
    pub org_name: String,
    /// Set once the person exists.
    pub org: Option<String>,
    /// Set once the workload runs.
    pub workload: Option<FirstWorkload>,
}

/// The first workload as the API answered it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FirstWorkload {
    pub name: String,
    pub url: String,
    /// `warm`, `cold` or `queued`.
    pub placement: String,
    pub total_ms: f64,
    /// `[step, milliseconds]`.
    pub steps: Vec<(String, f64)>,
}

/// Of the first workload: it is small.
pub const FIRST_WORKLOAD_TIER: &str = "free";

impl FirstRun {
    fn path(data: &Path) -> PathBuf {
        data.join("first-run.json")
    }

    /// What an earlier run kept, or a fresh person with a generated password, kept before it is used: a crash in between
    /// must not leave an account nobody can enter.
    pub fn load_or_generate(data: &Path) -> Result<Self> {
        let path = Self::path(data);
        match fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let first = FirstRun {
                    email: "you@clawhq.local".into(),
                    password: generate_password(),
                    org_name: "Home".into(),
                    org: None,
                    workload: None,
                };
                first.save(data)?;
                Ok(first)
            }
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    /// What an earlier run kept, if any.
    pub fn load(data: &Path) -> Option<Self> {
        serde_json::from_str(&fs::read_to_string(Self::path(data)).ok()?).ok()
    }

    fn save(&self, data: &Path) -> Result<()> {
        let path = Self::path(data);
        let partial = path.with_extension("partial");
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&partial, &path)?;
        Ok(())
    }
}

/// 20 characters that are not mistaken for each other: 98 bits.
fn generate_password() -> String {
    const ALPHABET: &[u8] = b"abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789";
    let mut random = [0u8; 20];
    // Rejection would be exact; 256 mod 56 costs a fraction of a bit, which 20 characters can spare.
    rand::fill(&mut random);
    random.iter().map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()])).collect()
}

/// A person's browser, as far as the API can tell.
pub struct Client {
    http: reqwest::Client,
    origin: String,
}

impl Client {
    /// For the API that listens at `api`.
    pub fn new(api: SocketAddr) -> Result<Self> {
        let http = reqwest::Client::builder()
            .cookie_store(true)
            .no_proxy()
            .connect_timeout(Duration::from_secs(5))
            .timeout(Duration::from_secs(90))
            .build()?;
        Ok(Client { http, origin: format!("http://{api}") })
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> Result<(StatusCode, Value)> {
        let mut request = self
            .http
            .request(method.clone(), format!("{}/v1{path}", self.origin))
            .header(header::ORIGIN, &self.origin)
            .header("Sec-Fetch-Site", "same-origin");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.with_context(|| format!("{method} {path}"))?;
        let status = response.status();
        let text = response.text().await.with_context(|| format!("{method} {path}"))?;
        let value =
            if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap_or(Value::String(text)) };
        Ok((status, value))
    }

    async fn expect(&self, method: Method, path: &str, body: Option<Value>, headers: &[(&str, &str)]) -> Result<Value> {
        let (status, value) = self.call(method.clone(), path, body, headers).await?;
        if !status.is_success() {
            bail!("{method} /v1{path} answered {status}: {}", problem(&value));
        }
        Ok(value)
    }

    /// Signs in, or up when nobody is there yet, and says which org is theirs.
    pub async fn enter(&self, data: &Path, first: &mut FirstRun) -> Result<String> {
        let credentials = json!({"email": first.email, "password": first.password});
        let (status, _) = self.call(Method::POST, "/auth/sign-in", Some(credentials.clone()), &[]).await?;
        if !status.is_success() {
            let mut body = credentials;
            body["org_name"] = json!(first.org_name);
            self.expect(Method::POST, "/auth/sign-up", Some(body), &[]).await?;
        }
        let me = self.expect(Method::GET, "/me", None, &[]).await?;
        let org = me["orgs"][0]["slug"].as_str().context("the first person has no org")?.to_owned();
        if first.org.as_deref() != Some(&org) {
            first.org = Some(org.clone());
            first.save(data)?;
        }
        Ok(org)
    }

    /// Deploys `hello` once, whatever happened before, and waits until it runs.
    pub async fn deploy_hello(&self, data: &Path, first: &mut FirstRun, org: &str) -> Result<FirstWorkload> {
        if let Some(done) = &first.workload {
            return Ok(done.clone());
        }
        let path = format!("/orgs/{org}/workloads");
        // The password's file is written once per data directory, so its person is a key as durable as the deploy.
        let key = format!("first-workload-{org}");
        let body = json!({"name": "hello", "template": "hello", "tier": FIRST_WORKLOAD_TIER});
        let created = self
            .expect(Method::POST, &path, Some(body), &[("Idempotency-Key", &key), ("Prefer", "wait=30")])
            .await
            .context("the first workload could not be deployed")?;
        let placement = created["placement"].clone();
        let url =
            created["access"]["url"].as_str().or(created["url"].as_str()).context("the workload has no address")?;
        if created["state"] != "running" {
            let wait = format!("{path}/hello/wait?state=running&timeout_ms=60000");
            let (status, value) = self.call(Method::GET, &wait, None, &[]).await?;
            if !status.is_success() || value["state"] != "running" {
                bail!("the first workload does not run: {}", problem(&value));
            }
        }
        let steps = placement["steps"].as_array().map(Vec::as_slice).unwrap_or_default();
        let done = FirstWorkload {
            name: "hello".into(),
            url: url.to_owned(),
            placement: placement["kind"].as_str().unwrap_or("unknown").to_owned(),
            total_ms: placement["total_ms"].as_f64().unwrap_or_default(),
            steps: steps
                .iter()
                .filter_map(|step| Some((step["name"].as_str()?.to_owned(), step["ms"].as_f64()?)))
                .collect(),
        };
        first.workload = Some(done.clone());
        first.save(data)?;
        Ok(done)
    }
}

/// Asks the workload itself, through the edge and by its own host name, until it answers.
pub async fn answers(url: &str, edge: SocketAddr, patience: Duration) -> Result<()> {
    let host = reqwest::Url::parse(url)?.host_str().context("the workload's address has no host")?.to_owned();
    // Resolved here, for not every system maps *.localhost to the loopback address.
    let client = reqwest::Client::builder().no_proxy().resolve(&host, edge).timeout(Duration::from_secs(5)).build()?;
    let deadline = Instant::now() + patience;
    loop {
        let problem = match client.get(url).send().await {
            Ok(response) if response.status().is_success() => return Ok(()),
            Ok(response) => format!("it answered {}", response.status()),
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() > deadline {
            bail!("{url} does not answer: {problem}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The gist of a problem+json body.
fn problem(value: &Value) -> String {
    let text = |key: &str| value[key].as_str().unwrap_or_default();
    match (text("code"), text("detail")) {
        ("", "") => value.to_string().chars().take(300).collect(),
        (code, "") => format!("{code}: {}", text("title")),
        (code, detail) => format!("{code}: {detail}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_is_kept_private_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert!(FirstRun::load(dir.path()).is_none());
        let first = FirstRun::load_or_generate(dir.path()).unwrap();
        let again = FirstRun::load_or_generate(dir.path()).unwrap();
        assert_eq!(first.password, again.password);
        assert_eq!(first.password.len(), 20);
        let mode = fs::metadata(dir.path().join("first-run.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_ne!(generate_password(), generate_password());
    }

    #[test]
    fn a_damaged_file_is_an_error_and_not_a_second_person() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("first-run.json"), "{").unwrap();
        assert!(FirstRun::load_or_generate(dir.path()).is_err());
    }
}
