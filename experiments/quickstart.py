"""Run the quickstart from Python, and print its accuracy, epsilon and bytes."""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

from fedlora import simulate

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", default="runs/quickstart-script", help="the run folder to write")
    result = simulate("experiments/quickstart.toml", output=parser.parse_args().output)
    final = result.summary["final"]
    print(f"accuracy {final['accuracy']:.3f}, majority {final['majority']:.3f}")
    print(f"epsilon {result.summary['epsilon']['max']:.2f}")
    print(f"bytes up {result.summary['communication']['uplink_bytes']:,}")
