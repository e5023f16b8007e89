//! The parts of a cold start: boots that differ from the usual one in one way.

use std::fmt::Write;

use anyhow::Result;
use pigeon_lab::disk::Format;

use crate::boots::{Figures, Lab, Subject, Variant, median};

const fn variant(name: &'static str, arguments: &'static [&'static str]) -> Variant {
    Variant {
        name,
        arguments,
        root: None,
        compressor: &[],
    }
}

/// The others are compared with the first one: the lab's own parameters (including `quiet`),
/// Debian's kernel with its drivers as modules, an uncompressed initrd, an ext4 root.
const VARIANTS: [Variant; 16] = [
    variant("as it is", &[]),
    variant("without `quiet`", &["loglevel=7"]),
    variant("`8250.nr_uarts=1`", &["8250.nr_uarts=1"]),
    variant("`i8042.noaux`", &["i8042.noaux"]),
    variant("`i8042.noaux i8042.nokbd`", &["i8042.noaux", "i8042.nokbd"]),
    variant("`random.trust_cpu=off`", &["random.trust_cpu=off"]),
    variant("`cryptomgr.notests`", &["cryptomgr.notests"]),
    variant("`init_on_alloc=0`", &["init_on_alloc=0"]),
    variant("`INIT_LOG_LEVEL=warn`", &["INIT_LOG_LEVEL=warn"]),
    variant("`PIGEON_CONFIG=file`", &["PIGEON_CONFIG=file"]),
    variant("`PIGEON_CGROUPS=unified`", &["PIGEON_CGROUPS=unified"]),
    variant("`PIGEON_CGROUPS=none`", &["PIGEON_CGROUPS=none"]),
    Variant {
        compressor: &["gzip", "-9n"],
        ..variant("initrd with gzip", &[])
    },
    Variant {
        compressor: &["zstd", "-19", "-q"],
        ..variant("initrd with zstd", &[])
    },
    Variant {
        root: Some((Format::Erofs, "erofs")),
        ..variant("root is an erofs", &[])
    },
    Variant {
        root: Some((Format::Squashfs, "squashfs")),
        ..variant("root is a squashfs", &[])
    },
];

/// The parts of a cold start: a figure of a boot in nanoseconds, and its name.
const PARTS: [(&str, &str); 3] = [
    ("kernel_ns", "kernel"),
    ("modules_ns", "modules"),
    ("boot_ns", "init"),
];

/// Boots each variant `runs` times, in turns, and prints the medians and the savings.
pub fn run(lab: &Lab, subject: &Subject, runs: usize) -> Result<()> {
    let mut samples: [Vec<Figures>; VARIANTS.len()] = Default::default();
    for run in 1..=runs {
        for (variant, samples) in VARIANTS.iter().zip(&mut samples) {
            eprintln!("bench: run {run} of {runs}: {}", variant.name);
            samples.push(lab.boot_variant(subject, variant)?);
        }
    }
    print!("{}", table(&samples));
    Ok(())
}

fn table(samples: &[Vec<Figures>]) -> String {
    let mut out = String::from("| |");
    for (_, part) in PARTS {
        out += &format!(" {part}, ms |");
    }
    out += " together, ms | less, ms | console, bytes |\n|---|";
    out += &"---:|".repeat(PARTS.len() + 3);
    out += "\n";
    let mut usual = None;
    for (variant, samples) in VARIANTS.iter().zip(samples) {
        let parts = PARTS.map(|(figure, _)| middle(samples, figure) / 1e6);
        let together = parts.iter().sum::<f64>();
        let usual = *usual.get_or_insert(together);
        write!(out, "| {} |", variant.name).expect("a String takes it all");
        for time in parts.iter().chain([&together, &(usual - together)]) {
            write!(out, " {time:.2} |").expect("a String takes it all");
        }
        let bytes = middle(samples, "console_bytes");
        writeln!(out, " {bytes} |").expect("a String takes it all");
    }
    out
}

/// The median of a figure.
fn middle(samples: &[Figures], name: &str) -> f64 {
    let values = samples.iter().filter_map(|figures| figures.get(name));
    median(&mut values.copied().collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_variant_is_compared_with_the_first() {
        let boot = |kernel: f64, init: f64| {
            let figures = [
                ("kernel_ns", kernel),
                ("modules_ns", 1e6),
                ("boot_ns", init),
                ("console_bytes", 130.0),
            ];
            vec![Figures::from(
                figures.map(|(name, value)| (name.to_string(), value)),
            )]
        };
        let table = table(&[boot(100e6, 5e6), boot(90e6, 6e6)]);
        let rows: Vec<_> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| as it is | 100.00 | 1.00 | 5.00 | 106.00 | 0.00 | 130 |",
                "| without `quiet` | 90.00 | 1.00 | 6.00 | 97.00 | 9.00 | 130 |",
            ]
        );
    }
}
