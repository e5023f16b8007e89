//! The bill of materials of a program, from `cargo metadata` on standard input and a lock file: CycloneDX 1.5
//! (ECMA-424), reproducible for a given lock.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{self, Read},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

fn main() -> Result<()> {
    let lock = env::args()
        .nth(1)
        .context("usage: materials CARGO.LOCK <METADATA")?;
    let lock = fs::read_to_string(lock).context("unable to read the lock file")?;
    let mut metadata = String::new();
    io::stdin().read_to_string(&mut metadata)?;
    let metadata = serde_json::from_str(&metadata).context("not what cargo metadata prints")?;
    println!(
        "{}",
        serde_json::to_string_pretty(&bill(&metadata, &lock)?)?
    );
    Ok(())
}

/// SHA-256 of registry packages, by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let mut found = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let field = |name: &str| {
            let prefix = format!("{name} = \"");
            let line = package
                .lines()
                .find_map(|line| line.strip_prefix(&prefix))?;
            line.strip_suffix('"').map(String::from)
        };
        if let (Some(name), Some(version), Some(sum)) =
            (field("name"), field("version"), field("checksum"))
        {
            found.insert((name, version), sum);
        }
    }
    found
}

fn bill(metadata: &Value, lock: &str) -> Result<Value> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let root = metadata["resolve"]["root"]
        .as_str()
        .context("no root package")?;
    let nodes: BTreeMap<String, Value> = list(&metadata["resolve"]["nodes"])
        .into_iter()
        .filter_map(|node| Some((node["id"].as_str()?.to_string(), node)))
        .collect();
    // Only normal dependencies, without those of tests and build scripts.
    let needs = |id: &str| -> BTreeSet<String> {
        let dependencies = nodes
            .get(id)
            .map(|node| list(&node["deps"]))
            .unwrap_or_default();
        dependencies
            .iter()
            .filter(|dependency| {
                list(&dependency["dep_kinds"])
                    .iter()
                    .any(|kind| kind["kind"].is_null())
            })
            .filter_map(|dependency| dependency["pkg"].as_str().map(String::from))
            .collect()
    };
    let mut reached = BTreeSet::new();
    let mut todo = vec![root.to_string()];
    while let Some(id) = todo.pop() {
        if reached.insert(id.clone()) {
            todo.extend(needs(&id));
        }
    }
    let packages: BTreeMap<String, Value> = list(&metadata["packages"])
        .into_iter()
        .filter_map(|package| Some((package["id"].as_str()?.to_string(), package)))
        .collect();
    let checksums = checksums(lock);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let name_of = |id: &str| {
        let package = packages.get(id)?;
        Some((text(&package["name"]), text(&package["version"])))
    };
    let reference = |id: &str| {
        let (name, version) = name_of(id).context("a package without description")?;
        anyhow::Ok(format!("pkg:cargo/{name}@{version}"))
    };
    let describe = |id: &str, kind: &str| {
        let package = packages.get(id).context("a package without description")?;
        let (name, version) = name_of(id).context("a package without name")?;
        let reference = reference(id)?;
        let mut component = json!({
            "type": kind,
            "bom-ref": reference,
            "name": name,
            "version": version,
            "purl": reference,
        });
        if let Some(licence) = package["license"].as_str() {
            // An old syntax of the expression.
            let expression = licence.replace('/', " OR ");
            component["licenses"] = json!([{"expression": expression}]);
        }
        if let Some(sum) = checksums.get(&(name, version)) {
            component["hashes"] = json!([{"alg": "SHA-256", "content": sum}]);
        }
        anyhow::Ok(component)
    };
    let others = reached.iter().filter(|id| *id != root);
    let mut components: Vec<Value> = others
        .map(|id| describe(id, "library"))
        .collect::<Result<_>>()?;
    components.sort_by_key(|component| component["bom-ref"].to_string());
    let mut dependencies = vec![];
    for id in &reached {
        let on = needs(id)
            .iter()
            .map(|id| reference(id))
            .collect::<Result<BTreeSet<_>>>()?;
        dependencies.push(json!({"ref": reference(id)?, "dependsOn": on}));
    }
    dependencies.sort_by_key(|dependency| dependency["ref"].to_string());
    let mut bill = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": describe(root, "application")?},
        "components": components,
        "dependencies": dependencies,
    });
    // Derived from the contents, so that it is reproducible.
    let digest = Sha256::digest(bill.to_string());
    let hex: String = digest
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    bill["serialNumber"] = json!(format!(
        "urn:uuid:{}-{}-4{}-8{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[13..16],
        &hex[17..20],
        &hex[20..]
    ));
    Ok(bill)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bill_has_what_is_built_in_with_licence_and_checksum() {
        let metadata = json!({
            "packages": [
                {"id": "r", "name": "root", "version": "0.1.0", "license": "MIT"},
                {"id": "a", "name": "a", "version": "1.0.0", "license": "MIT/Apache-2.0"},
                {"id": "t", "name": "t", "version": "2.0.0", "license": "MIT"},
            ],
            "resolve": {"root": "r", "nodes": [
                {"id": "r", "deps": [
                    {"pkg": "a", "dep_kinds": [{"kind": null}]},
                    {"pkg": "t", "dep_kinds": [{"kind": "dev"}]},
                ]},
                {"id": "a", "deps": []},
                {"id": "t", "deps": []},
            ]},
        });
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n\
                    checksum = \"00ff\"\n\n[[package]]\nname = \"root\"\nversion = \"0.1.0\"\n";
        let bill = bill(&metadata, lock).unwrap();
        assert_eq!(bill["metadata"]["component"]["name"], "root");
        let components = bill["components"].as_array().unwrap();
        assert_eq!(components.len(), 1);
        assert_eq!(components[0]["purl"], "pkg:cargo/a@1.0.0");
        assert_eq!(
            components[0]["licenses"][0]["expression"],
            "MIT OR Apache-2.0"
        );
        assert_eq!(components[0]["hashes"][0]["content"], "00ff");
        assert_eq!(
            bill["dependencies"][1]["dependsOn"],
            json!(["pkg:cargo/a@1.0.0"])
        );
    }
}
