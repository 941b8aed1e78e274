//! The templates this build ships.

use anyhow::{Context, Result, bail};
use clawhq_domain::template::Template;

/// In the order of the catalogue.
const SHIPPED: &[(&str, &str)] = &[
    ("hello", include_str!("../../templates/hello.json")),
    ("openclaw", include_str!("../../templates/openclaw.json")),
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
            let value = serde_json::from_str(text).with_context(|| format!("templates/{name}.json"))?;
            let mut template = clawhq_store::template_from_json(value)
                .with_context(|| format!("templates/{name}.json is not a template"))?;
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
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../templates");
        let files = std::fs::read_dir(dir).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
        let mut files: Vec<String> = files.filter_map(|name| Some(name.strip_suffix(".json")?.to_owned())).collect();
        files.sort();
        assert_eq!(names, files);
    }

    #[test]
    fn an_image_that_is_not_built_makes_its_template_unavailable() {
        let all = shipped(&["openclaw".to_owned()]).unwrap();
        assert!(all[0].unavailable.is_none());
        assert!(all[1].unavailable.as_ref().unwrap().contains("./dev images openclaw"));
        assert!(shipped(&["opnclaw".to_owned()]).is_err());
    }
}
