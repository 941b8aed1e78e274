//! The templates this build ships.

use anyhow::{Context, Result, bail};
use clawhq_domain::template::Template;

/// In the order of the catalogue.
const SHIPPED: &[(&str, &str)] = &[
    ("hello", include_str!("../../templates/hello.json")),
    ("openclaw", include_str!("../../templates/openclaw.json")),
    ("conduit-balancer", include_str!("../../workloads/conduit-balancer/template.json")),
    ("proxy-hub", include_str!("../../workloads/proxy-hub/template.json")),
];

/// Every shipped template; those in `without` say that their image is not built here yet.
///
/// # Errors
/// When `without` names a template that does not exist.
pub fn shipped(without: &[String]) -> Result<Vec<Template>> {
    if let Some(unknown) = without.iter().find(|name| !SHIPPED.iter().any(|(known, _)| known == name)) {
        bail!("there is no template {unknown}");
    }
    SHIPPED
        .iter()
        .map(|(name, text)| {
            let value = serde_json::from_str(text).with_context(|| format!("the template {name}"))?;
            let mut template = clawhq_store::template_from_json(value)
                .with_context(|| format!("the template {name} is of another form"))?;
            if without.iter().any(|absent| absent == name) {
                template.unavailable = Some(format!("Its image is not built on this machine: ./dev images {name}"));
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
        let all = shipped(&[]).unwrap();
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
        let all = shipped(&[]).unwrap();
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
        let all = shipped(&["openclaw".to_owned()]).unwrap();
        assert!(all[0].unavailable.is_none());
        assert!(all[1].unavailable.as_ref().unwrap().contains("./dev images openclaw"));
        assert!(shipped(&["opnclaw".to_owned()]).is_err());
    }
}
