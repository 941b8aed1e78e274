//! The templates this build ships.

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use clawhq_domain::template::Template;

/// In the order of the catalogue.
const SHIPPED: &[(&str, &str)] = &[
    ("hello", include_str!("../../templates/hello.json")),
    ("openclaw", include_str!("../../templates/openclaw.json")),
    ("conduit-balancer", include_str!("../../workloads/conduit-balancer/template.json")),
    ("proxy-hub", include_str!("../../workloads/proxy-hub/template.json")),
];

/// What is known of the shipped templates' images on this machine.
#[derive(Args, Clone, Debug, Default)]
pub struct Images {
    /// A template whose image is not built here yet.
    #[arg(long, value_name = "NAME")]
    without: Vec<String>,
    /// What a template's image is from now on: slots and releases are made of just that.
    #[arg(long, value_name = "NAME=sha256:HEX")]
    digest: Vec<String>,
}

impl Images {
    fn digest_of(&self, name: &str) -> Option<String> {
        self.digest.iter().find_map(|one| Some(one.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
    }

    fn check(&self) -> Result<()> {
        let known = |name: &str| SHIPPED.iter().any(|(known, _)| *known == name);
        if let Some(unknown) = self.without.iter().find(|name| !known(name)) {
            bail!("there is no template {unknown}");
        }
        for one in &self.digest {
            let (name, digest) = one.split_once('=').with_context(|| format!("{one} is not NAME=sha256:HEX"))?;
            ensure!(known(name), "there is no template {name}");
            let hex = digest.strip_prefix("sha256:").unwrap_or_default();
            let is_digest = hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            ensure!(is_digest, "{digest} is no digest: sha256: and 64 hexadecimal digits");
        }
        Ok(())
    }
}

/// Every shipped template, with what is known of its image.
///
/// # Errors
/// When `images` names a template that does not exist, or something that is no digest.
pub fn shipped(images: &Images) -> Result<Vec<Template>> {
    images.check()?;
    SHIPPED
        .iter()
        .map(|(name, text)| {
            let value = serde_json::from_str(text).with_context(|| format!("the template {name}"))?;
            let mut template = clawhq_store::template_from_json(value)
                .with_context(|| format!("the template {name} is of another form"))?;
            template.image_digest = images.digest_of(name).or(template.image_digest);
            if images.without.iter().any(|absent| absent == name) {
                let why = || format!("Its image is not built on this machine: ./dev images {name}");
                template.unavailable.get_or_insert_with(why);
            }
            Ok(template)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_a_template_of_its_name() {
        let all = shipped(&Images::default()).unwrap();
        let names: Vec<String> = all.iter().map(|template| template.name.to_string()).collect();
        assert_eq!(names, SHIPPED.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>());
        // A file that is forgotten here would never be offered.
        let listed = |dir: &str| {
            let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(dir);
            std::fs::read_dir(root).unwrap().flatten().map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let stem = |path: &std::path::Path| path.file_stem().unwrap().to_string_lossy().into_owned();
        let files = listed("templates").into_iter().filter(|path| path.extension().is_some_and(|end| end == "json"));
        let workloads = listed("workloads").into_iter().filter(|path| path.join("template.json").is_file());
        let mut files: Vec<String> = files.chain(workloads).map(|path| stem(&path)).collect();
        files.sort();
        let mut names = names;
        names.sort();
        assert_eq!(names, files);
    }

    /// What tells them apart from a web app: their ports, and what a customer may set.
    #[test]
    fn network_services_show_their_ports_and_a_schema() {
        let all = shipped(&Images::default()).unwrap();
        let find = |name: &str| all.iter().find(|template| template.name.to_string() == name).unwrap();
        let balancer = find("conduit-balancer");
        let ports: Vec<u16> = balancer.ports.iter().map(|port| port.port).collect();
        assert_eq!(ports, [443, 5566, 5566, 9600]);
        for name in ["conduit-balancer", "proxy-hub"] {
            let schema: serde_json::Value = serde_json::from_str(find(name).config_schema.as_ref().unwrap()).unwrap();
            assert!(!schema["properties"].as_object().unwrap().is_empty(), "{name}");
        }
    }

    #[test]
    fn an_image_that_is_not_built_makes_its_template_unavailable() {
        let without = |name: &str| Images { without: vec![name.to_owned()], ..Images::default() };
        let all = shipped(&without("openclaw")).unwrap();
        assert!(all[0].unavailable.is_none());
        assert!(all[1].unavailable.as_ref().unwrap().contains("./dev images openclaw"));
        assert!(shipped(&without("opnclaw")).is_err());
    }

    #[test]
    fn an_image_is_pinned_by_its_digest() {
        let digest = |one: String| shipped(&Images { digest: vec![one], ..Images::default() });
        let sha = format!("sha256:{}", "0a".repeat(32));
        let all = digest(format!("hello={sha}")).unwrap();
        assert_eq!(all[0].image_digest.as_ref(), Some(&sha));
        assert_eq!(all[1].image_digest, None);
        for wrong in [format!("hullo={sha}"), "hello=sha256:0a".to_owned(), sha.clone(), format!("hello={sha}0")] {
            assert!(digest(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
